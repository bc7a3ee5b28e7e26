"use strict";

const $ = (id) => document.getElementById(id);
const conversation = []; // messages, as the API has them
let attached = []; // parts for the next message: {part, url, name, kind}
let running = null; // AbortController of the answer that comes

// ------------------------------------------------------------------------------------------ the server

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function look() {
  try {
    const ready = await fetch("/ready");
    $("state").textContent = ready.ok ? "Ready." : `Not ready: ${await failure(ready)}`;
    if (ready.ok) {
      const models = await fetch("/v1/models", { headers: headers() });
      if (models.ok) {
        $("model").textContent = (await models.json()).data[0].id;
      } else {
        $("state").textContent = `${await failure(models)} (Settings)`;
      }
      return;
    }
  } catch {
    $("state").textContent = "The server is not reached.";
  }
  setTimeout(look, 2000);
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const lines = rest.split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// ------------------------------------------------------------------------------------------ media

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// What the server reads whatever is installed there; the rest is made WAV, such as what browsers record.
const READ = /^audio\/(x-)?(wav|wave|flac|ogg|mpeg|mp3)/;

async function asWav(blob) {
  const context = new AudioContext();
  try {
    const audio = await context.decodeAudioData(await blob.arrayBuffer());
    const rate = 16000;
    const offline = new OfflineAudioContext(1, Math.max(1, Math.ceil(audio.duration * rate)), rate);
    const source = offline.createBufferSource();
    source.buffer = audio;
    source.connect(offline.destination);
    source.start();
    const samples = (await offline.startRendering()).getChannelData(0);
    const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
    const text = (at, s) => [...s].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
    text(0, "RIFF");
    view.setUint32(4, 36 + 2 * samples.length, true);
    text(8, "WAVEfmt ");
    view.setUint32(16, 16, true);
    view.setUint16(20, 1, true); // PCM
    view.setUint16(22, 1, true); // channels
    view.setUint32(24, rate, true);
    view.setUint32(28, 2 * rate, true);
    view.setUint16(32, 2, true);
    view.setUint16(34, 16, true);
    text(36, "data");
    view.setUint32(40, 2 * samples.length, true);
    samples.forEach((x, i) => view.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, x))), true));
    return new Blob([view.buffer], { type: "audio/wav" });
  } finally {
    context.close();
  }
}

async function attach(blob, name) {
  const kind = blob.type.startsWith("image/") ? "image" : "audio";
  const url = await dataUrl(kind === "image" || READ.test(blob.type) ? blob : await asWav(blob));
  const part = kind === "image" ? { type: "image_url", image_url: { url } } : { type: "audio_url", audio_url: { url } };
  attached.push({ part, url, name, kind });
  showAttached();
}

function medium({ kind, url, name }) {
  const shown = document.createElement(kind === "image" ? "img" : "audio");
  shown.src = url;
  if (kind === "image") shown.alt = name;
  else {
    shown.controls = true;
    shown.setAttribute("aria-label", name);
  }
  return shown;
}

function showAttached() {
  $("attached").replaceChildren(...attached.map((item) => {
    const li = document.createElement("li");
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "Remove";
    remove.setAttribute("aria-label", `Remove ${item.name}`);
    remove.onclick = () => {
      attached = attached.filter((other) => other !== item);
      showAttached();
    };
    li.append(medium(item), item.name, " ", remove);
    return li;
  }));
}

function tell(error) {
  const li = entry("error");
  li.textContent = error.message || String(error);
}

// Press once to begin, once more to end.
function recorder(button, done) {
  let recording = null;
  button.onclick = async () => {
    if (recording) return recording.stop();
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
      const blobs = [];
      recording = new MediaRecorder(stream);
      recording.ondataavailable = (event) => blobs.push(event.data);
      recording.onstop = async () => {
        const type = recording.mimeType;
        recording = null;
        stream.getTracks().forEach((track) => track.stop());
        button.setAttribute("aria-pressed", "false");
        button.textContent = "Record";
        try {
          await done(await asWav(new Blob(blobs, { type })));
        } catch (error) {
          tell(error);
        }
      };
      recording.start();
      button.setAttribute("aria-pressed", "true");
      button.textContent = "Stop recording";
    } catch (error) {
      tell(new Error(`The microphone cannot be used: ${error.message}`));
    }
  };
}

let cameraStream = null;

function closeCamera() {
  cameraStream.getTracks().forEach((track) => track.stop());
  cameraStream = null;
  $("camera-view").hidden = true;
  $("camera").setAttribute("aria-pressed", "false");
  $("camera").textContent = "Camera";
}

$("camera").onclick = async () => {
  const view = $("camera-view");
  if (cameraStream) { // the picture is taken
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [view.videoWidth, view.videoHeight];
    canvas.getContext("2d").drawImage(view, 0, 0);
    closeCamera();
    canvas.toBlob((blob) => blob && attach(blob, "Picture"), "image/jpeg", 0.92);
    return;
  }
  try {
    cameraStream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    view.srcObject = cameraStream;
    view.hidden = false;
    await view.play();
    $("camera").setAttribute("aria-pressed", "true");
    $("camera").textContent = "Take picture";
  } catch (error) {
    if (cameraStream) closeCamera();
    tell(new Error(`The camera cannot be used: ${error.message}`));
  }
};

async function attachAll(event) {
  const files = [...event.target.files];
  event.target.value = "";
  for (const file of files) {
    try {
      await attach(file, file.name);
    } catch (error) {
      tell(new Error(`${file.name} cannot be read: ${error.message}`));
    }
  }
}

// ------------------------------------------------------------------------------------------ the chat

function entry(kind) {
  const li = document.createElement("li");
  li.className = kind;
  $("messages").append(li);
  li.scrollIntoView({ block: "end" });
  return li;
}

function busy(is) {
  $("send").disabled = is;
  $("stop").hidden = !is;
}

$("ask").onsubmit = async (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (running || (!text && !attached.length)) return;
  const content = [...attached.map((item) => item.part), ...(text ? [{ type: "text", text }] : [])];
  const said = entry("user");
  said.append(...attached.map(medium), text);
  conversation.push({ role: "user", content });
  attached = [];
  showAttached();
  $("text").value = "";
  await answer();
  $("text").focus();
};

async function answer() {
  const system = $("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    temperature: Number($("temperature").value) || 0,
    max_tokens: Number($("limit").value) || 512,
    stream: true,
    stream_options: { include_usage: true },
  };
  running = new AbortController();
  busy(true);
  const began = performance.now();
  let first = null;
  let usage = null;
  const li = entry("assistant");
  const said = document.createElement("span");
  li.append(said);
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), signal: running.signal,
      headers: { "Content-Type": "application/json", ...headers() },
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      const piece = event.choices.length ? event.choices[0].delta.content : "";
      if (piece) {
        first ??= performance.now();
        said.textContent += piece;
        li.scrollIntoView({ block: "end" });
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(error);
  }
  if (said.textContent) conversation.push({ role: "assistant", content: said.textContent });
  else {
    li.remove();
    conversation.pop(); // the question, which is asked again with the next one otherwise
  }
  if (usage && first !== null) {
    const figures = document.createElement("span");
    figures.className = "figures";
    const seconds = (performance.now() - first) / 1000;
    const speed = seconds > 0.01 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    figures.textContent = `${usage.prompt_tokens} tokens in, ${usage.completion_tokens} out, first after `
      + `${((first - began) / 1000).toFixed(2)} s${speed}`;
    li.append(figures);
  }
  running = null;
  busy(false);
}

$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
$("stop").onclick = () => running && running.abort();
$("clear").onclick = () => {
  if (running) running.abort();
  conversation.length = 0;
  attached = [];
  showAttached();
  $("messages").replaceChildren();
  $("text").focus();
};
$("image").onchange = attachAll;
$("sound").onchange = attachAll;
recorder($("record"), (blob) => attach(blob, "Recording"));

// ------------------------------------------------------------------------------------------ the transcript

let clip = null;

function choose(blob, name) {
  clip = new File([blob], name);
  URL.revokeObjectURL($("player").src);
  $("player").src = URL.createObjectURL(blob);
  $("player").hidden = false;
  $("heard-state").textContent = name;
}

$("clip").onchange = async (event) => {
  const file = event.target.files[0];
  if (!file) return;
  try {
    choose(READ.test(file.type) ? file : await asWav(file), file.name);
  } catch (error) {
    $("heard-state").textContent = `${file.name} cannot be read: ${error.message}`;
  }
};
recorder($("record-clip"), (blob) => choose(blob, "recording.wav"));

function clock(seconds) {
  const [minutes, rest] = [Math.floor(seconds / 60), (seconds % 60).toFixed(1).padStart(4, "0")];
  return `${minutes}:${rest}`;
}

$("listen").onsubmit = async (event) => {
  event.preventDefault();
  if (!clip) {
    $("heard-state").textContent = "Choose a clip, or record one.";
    return;
  }
  $("write").disabled = true;
  $("heard-state").textContent = "Listening …";
  const form = new FormData();
  form.append("file", clip);
  form.append("response_format", "verbose_json");
  try {
    const response = await fetch(`/v1/audio/${$("task").value}`, { method: "POST", body: form, headers: headers() });
    if (!response.ok) throw new Error(await failure(response));
    const found = await response.json();
    $("heard").tBodies[0].replaceChildren(...found.segments.map((segment) => {
      const row = document.createElement("tr");
      const play = document.createElement("button");
      play.type = "button";
      play.textContent = `${clock(segment.start)} – ${clock(segment.end)}`;
      play.setAttribute("aria-label", `Play from ${clock(segment.start)}`);
      play.onclick = () => {
        $("player").currentTime = segment.start;
        $("player").play();
      };
      row.insertCell().append(play);
      row.insertCell().textContent = segment.text;
      return row;
    }));
    $("heard").hidden = false;
    $("heard-state").textContent = `${clock(found.duration)} heard, ${found.usage.output_tokens} tokens out`;
  } catch (error) {
    $("heard-state").textContent = error.message;
  }
  $("write").disabled = false;
};

// ------------------------------------------------------------------------------------------ tabs

const tabs = [...document.querySelectorAll('[role="tab"]')];

function select(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
  tab.focus();
}

tabs.forEach((tab, i) => {
  tab.onclick = () => select(tab);
  tab.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) select(tabs[(i + step + tabs.length) % tabs.length]);
  };
});
$("key").onchange = look;
look();
