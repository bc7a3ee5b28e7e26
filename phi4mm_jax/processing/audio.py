"""temporary"""
import numpy as np, math, io
import soundfile, scipy.signal
def load_audio(s):
    if isinstance(s, tuple): x, r = np.asarray(s[0], np.float32), s[1]
    else:
        x, r = soundfile.read(io.BytesIO(s) if isinstance(s, bytes) else s, dtype='float32')
    return (x.mean(1) if x.ndim > 1 else x), r
def num_audio_tokens(n): return -(-n // 8)
def mel(n_fft, sr):
    nb = n_fft // 2 + 1
    f2m = lambda f: 1127.0 * np.log(1 + f / 700.0)
    bw = sr / n_fft
    lo, hi = f2m(0.0), f2m(7690.0)
    m = np.linspace(lo, hi, 82)
    bins = f2m(np.arange(nb) * bw)
    w = np.zeros((nb, 80), np.float32)
    f2b = lambda f: int(f * n_fft / sr + 0.5)
    for i in range(80):
        l, c, r = m[i:i+3]
        for b in range(f2b(0)+1, f2b(7690.0)):
            if l < bins[b] < r:
                w[b, i] = (bins[b]-l)/(c-l) if bins[b] <= c else (r-bins[b])/(r-c)
    return w
def log_mel(x, rate):
    if rate not in (8000, 16000):
        g = math.gcd(rate, 16000); x = scipy.signal.resample_poly(x, 16000//g, rate//g); rate = 16000
    win, hop, n = (200, 80, 256) if rate == 8000 else (400, 160, 512)
    k = (len(x)-win)//hop+1
    fr = np.lib.stride_tricks.sliding_window_view(x, win)[::hop][:k]
    prev = np.roll(fr, 1, 1).copy(); prev[:, 0] = fr[:, 0]
    fr = (fr - 0.97*prev)*32768
    S = np.fft.rfft(np.hamming(win)*fr, n=n, axis=1).astype(np.complex64)
    if rate == 8000: S = np.concatenate([S[:, :-1], np.zeros((k, 257-S.shape[1]+1))], 1)
    p = np.abs(S).astype(np.float32)**2
    return np.log(np.clip(p @ mel(512, 16000), 1.0, None)).astype(np.float32)
