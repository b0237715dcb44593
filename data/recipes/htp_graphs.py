"""What provider options do to a compiled network: EfficientNet-Lite0 on the HTP backend (emulated); half a minute.

    python data/recipes/htp_graphs.py data/results/measured/08_options.json

Written down are the bytes of the context binary that each option gives, whether the session opened at all, and whether
the execution provider said a word about the option.  The binaries are weighed and never opened.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from record import record

from qtools import zoo
from qtools.npu import htp
from qtools.ptq import fuse, graph
from qtools.ptq.convert import Options, quantize_network

# The article's keys, a word that nobody could mean, and documented options with values that are and are not allowed.
OPTIONS = (
    ("plain", {}),
    ("prefer_vtcm_tiling", {"prefer_vtcm_tiling": "1"}),
    ("max_tile_height", {"max_tile_height": "64"}),
    ("enable_dlbc", {"enable_dlbc": "1"}),
    ("make_coffee", {"make_coffee": "1"}),
    *((f"vtcm_mb_{size}", {"vtcm_mb": size}) for size in ("1", "2", "4", "8", "abc")),
    *((f"optimization_mode_{mode}", {"htp_graph_finalization_optimization_mode": mode}) for mode in "1239"),
    ("performance_mode_burst", {"htp_performance_mode": "burst"}),
    ("performance_mode_warp", {"htp_performance_mode": "warp"}),
    ("plain_again", {}),
)


def network(size: int = 224) -> bytes:
    """EfficientNet-Lite0 in w8a8, its ranges from noise: nothing is judged by what it sees."""
    shape = (1, 3, size, size)
    ready = fuse.fuse(graph.prepare(zoo.efficientnet_lite0(size), {"x": shape}))
    noise = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    options = Options(use_per_channel_quantization=True, use_per_row_quantization=True)
    return quantize_network(ready, [{"x": noise}], options).network.SerializeToString()


def compiled(model: bytes, options: Mapping[str, str]) -> tuple[int, str]:
    """Bytes of the context binary for an SM8650, and what the provider said meanwhile."""
    arch, soc = htp.SOCS["sm8650"]
    settings = ort.SessionOptions()
    settings.log_severity_level = 2  # warnings
    with tempfile.TemporaryDirectory() as folder, htp._silence() as said:
        loader = Path(folder, "network.onnx")
        entries = {"ep.context_enable": "1", "ep.context_file_path": str(loader), "ep.context_embed_mode": "0"}
        for key, value in {"session.disable_cpu_ep_fallback": "1", **entries}.items():
            settings.add_session_config_entry(key, value)
        backend = {"backend_path": htp._htp_path(), "htp_arch": arch[1:], "soc_model": soc}
        settings.add_provider_for_devices([htp._device()], {**backend, **options})
        ort.InferenceSession(model, settings)
        return sum(file.stat().st_size for file in Path(folder).glob("*.bin")), said()


def measure() -> dict[str, float]:
    """Bytes by option, and 1 for each that the provider said more words about than about none."""
    model, values = network(), {}
    usual = {line.split("] ")[-1] for line in compiled(model, {})[1].splitlines()}
    for name, options in OPTIONS:
        size, said = compiled(model, options)
        news = [line for line in said.splitlines() if "[W:" in line and line.split("] ")[-1] not in usual]
        values |= {f"binary_{name}": size, f"warned_{name}": int(bool(news))}
    return values


if __name__ == "__main__":
    record(sys.argv[1], measure(), about=htp.status().reason)
