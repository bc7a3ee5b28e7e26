"""Users' adapters over the API: loaded and unloaded while the server runs, asked for as models."""

import json
import shutil
from pathlib import Path

import httpx
import numpy as np
from helpers.serving import serving
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.serve.app import ServerSettings, create_app
from phi4mm_jax.serve.engine_process import EngineThread

MODEL = Path(__file__).parents[2] / "assets" / "tiny"
CONFIG = EngineConfig(slots=2, cache_tokens=1024, page_size=64, chunk=64, steps=4, max_adapters=1, max_adapter_rank=4)
DIGITS = [{"role": "user", "content": "number five two four three"}]


def test_adapters_come_and_go_over_the_api(tmp_path):
    """Its answer is the engine's own; no folder outside of the root is read."""
    model = phi4mm_jax.load(MODEL, dtype="float32", scan=True)  # fewer operations to compile
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "noise", outside):
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)
        tensors = load_file(next(MODEL.glob("speech-lora/*.safetensors")))
        shapes = {n: (4, x.shape[1]) if "lora_A" in n else (x.shape[0], 4) for n, x in tensors.items()}
        matrices = {n: random.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()}
        save_file(matrices, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": r".*\.(self_attn|mlp)\..*_proj"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    (root / "link").symlink_to(outside)
    (root / "hidden").mkdir()
    (root / "hidden" / "speech-lora").symlink_to(outside)
    shutil.copytree(root / "noise", root / "export" / "speech-lora")
    engine = model.engine(CONFIG)
    engine.load_adapter("noise", outside)
    ((_, expected),) = engine.run([Request(DIGITS, max_new_tokens=6, adapter="noise")])
    app = create_app(
        EngineThread(lambda: model.engine(CONFIG)), model.processor.tokenizer, CONFIG.slots,
        ServerSettings("tiny", tmp_path / "files", adapter_root=root, warm_up=False), engine.read_adapter,
    )  # fmt: skip
    asked = {"model": "noise", "messages": DIGITS, "max_tokens": 6}
    with serving(app) as url, httpx.Client(base_url=url, timeout=120) as client:

        def load(path: str, name: str = "noise") -> httpx.Response:
            body = json.dumps({"lora_name": name, "lora_path": path})  # half a surrogate pair as well
            return client.post("/v1/load_lora_adapter", content=body, headers={"Content-Type": "application/json"})

        for path in (
            "../outside",
            str(outside),
            "link",
            "absent",
            "hidden",
            "noise/../../outside",
            "a\0b",
            "\ud800",
            "",
        ):
            refused = load(path)
            assert (refused.status_code, refused.json()["error"]["param"]) == (404, "lora_path"), path
        assert client.post("/v1/chat/completions", json=asked).status_code == 404
        assert load("noise", "speech").status_code == 400
        assert load("noise").status_code == 200
        assert "is loaded already" in load("noise").json()["error"]["message"]
        assert "finds all 1 places taken" in load("noise", "other").json()["error"]["message"]
        answer = client.post("/v1/chat/completions", json=asked).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("noise", expected.text)
        plain = client.post("/v1/chat/completions", json=asked | {"model": "tiny"}).json()
        assert (plain["model"], plain["choices"][0]["message"]["content"]) == ("tiny", "5243")
        assert expected.text != "5243"
        listed = client.get("/v1/models").json()["data"]
        assert [(found["id"], found.get("parent")) for found in listed] == [("tiny", None), ("noise", "tiny")]
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "noise"}).status_code == 200
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "noise"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
        exported = load("export", "speech-again")  # in place of the model's own
        assert exported.status_code == 200, exported.text
        assert client.post("/v1/chat/completions", json=asked).status_code == 404
