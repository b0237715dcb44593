"""``qtools llm``: what can be done to large language models."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtools.llm.decode import Transformer
    from qtools.llm.llama import Llama, Taps

_SCHEMES = ("w4", "w8", "article")
_TEXT = Path(__file__).resolve().parents[2] / "data/small_llama/validation.txt"


def add_llm(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that take a checkpoint of the Llama architecture."""
    parser = commands.add_parser("llm", help="quantize language models, evaluate them, predict their speed")
    parts = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(parts)
    _add_eval(parts)
    _add_predict(parts)


def _add_quantize(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "pack the weights of a checkpoint of any size into 4 and 8 bits; once interrupted, the same call goes on"
    parser = parts.add_parser("quantize", help=about, description=about, allow_abbrev=False)
    add = parser.add_argument
    add("source", type=Path, metavar="CHECKPOINT", help="a safetensors file, or a folder of Hugging Face's")
    add("output", type=Path, metavar="FOLDER", help="that will hold packed safetensors and encodings")
    known = f"{', '.join(_SCHEMES)}, or a JSON file of patterns and formats (w4)"
    add("--scheme", default="w4", metavar="SCHEME", help=known)
    example = "such as '*.down_proj.weight=int8 channel' or '*.q_proj.weight=keep', over the scheme"
    add("--rule", action="append", default=[], metavar="PATTERN=FORMAT", help=example)
    add("--moments", type=Path, metavar="FILE", help="of the inputs of layers, for the methods clip, gptq and descent")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="threads (as many as there are processors)")
    parser.set_defaults(command=_quantize)


def _quantize(args: argparse.Namespace) -> int:
    import joblib

    from qtools.llm import weights

    start = time.perf_counter()
    try:
        scheme = _scheme(args.scheme) | dict(_rule(text) for text in args.rule)
        with joblib.parallel_config("threading", n_jobs=args.jobs):
            found = weights.quantize(
                args.source, args.output, scheme, moments=args.moments, progress=sys.stderr.isatty()
            )
    except (ValueError, OSError) as error:
        print(f"qtools llm quantize: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"{found.tensors} tensors at {found.bits:.3f} bits per weight: {found.read / 1e9:.3f} GB became "
          f"{found.written / 1e9:.3f} GB in {seconds:.1f} s ({found.read / 1e9 / seconds:.2f} GB/s)")  # fmt: skip
    if not found.encodings:
        print("no encodings.json: it would be larger than the 512 MB that readers take; the scales lie in the weights")
    return 0


def _add_eval(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "perplexity on a text, in floats and with weights, attention weights or cache on coarser grids"
    parser = parts.add_parser("eval", help=about, description=about, allow_abbrev=False)
    add = parser.add_argument
    add("model", type=Path, metavar="CHECKPOINT", help="a folder of Hugging Face's Llama architecture, or a GGUF file")
    add("--text", type=Path, metavar="FILE", help="to be evaluated on (the validation text of the bundled Llama)")
    add("--packed", type=Path, metavar="FOLDER", help="take the weights that qtools llm quantize wrote there")
    add("--weights", type=int, metavar="BITS", help="round the linear layers to so many bits, symmetrically")
    add("--group", type=int, default=0, metavar="N", help="weights that share a scale (0: those of an output)")
    add("--softmax", type=int, metavar="BITS", help="attention weights")
    add("--cache", type=int, metavar="BITS", help="keys and values, per token and head: 16, 8, 4 or 2")
    add("--windows", type=int, default=8, metavar="N", help="pieces of the text (8)")
    add("--length", type=int, default=128, metavar="N", help="tokens of each (128)")
    parser.set_defaults(command=_eval)


def _eval(args: argparse.Namespace) -> int:
    import torch

    from qtools.llm import evaluate, llama

    try:
        changes = [name for name in ("packed", "weights", "softmax", "cache") if getattr(args, name) is not None]
        if "packed" in changes and "weights" in changes:
            raise ValueError("the weights are either those of --packed or rounded to --weights")
        model = llama.load(args.model)
        if model.tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer, and a text is to be evaluated")
        ids = torch.tensor(model.tokenizer.encode((args.text or _TEXT).read_text(encoding="utf-8")).ids)
        windows = evaluate.windows(ids, args.windows, args.length)
        changed, taps = _changed(model, args)
        shown = sys.stderr.isatty()
        base = evaluate.perplexity(model, windows, progress=shown)
        print(f"perplexity {base:.3f} in floats, on {windows[:, 1:].numel()} tokens")
        if changes:
            found = evaluate.perplexity(changed, windows, taps, progress=shown)
            print(f"perplexity {found:.3f} ({100 * (found / base - 1):+.1f} %) with {', '.join(changes)}")
    except (ValueError, OSError) as error:
        print(f"qtools llm eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _changed(model: Llama, args: argparse.Namespace) -> tuple[Llama, Taps]:
    """The model, and what taps it, as the arguments want them."""
    import torch

    from qtools.affine import Grid
    from qtools.llm import evaluate, kv_cache, weights
    from qtools.llm.llama import Taps

    taps = []
    if args.packed is not None:
        packed = weights.load_packed(args.packed)
        model = model.with_weights({name: torch.from_numpy(packed[name].copy()) for name in packed.formats})
    if args.weights is not None:
        grid = Grid(args.weights, signed=True, symmetric=True, block_size=(1, args.group or -1))
        model = evaluate.quantized(model, grid)
    if args.softmax is not None:
        taps.append(evaluate.softmax(args.softmax))
    if args.cache is not None:
        taps.append(kv_cache.taps(*[kv_cache.Scheme(args.cache)] * 2))
    return model, evaluate.together(*taps) if taps else Taps()


def _add_predict(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "predict the time of a token, and to the first one, on phones; beside it the least that memory allows"
    parser = parts.add_parser("predict", help=about, description=about, allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?", type=Path, metavar="FOLDER", help="with a config.json of Hugging Face's (Llama 2 7B)")
    add("--soc", nargs="+", default=["sm8550", "sm8650", "sm8750", "sc8380xp"], metavar="CHIP", help="four by default")
    add("--context", type=int, default=1024, metavar="N", help="tokens that the cache has room for (1024)")
    add("--prompt", type=int, default=1024, metavar="N", help="tokens before the first one (1024)")
    add("--weights", type=int, default=4, metavar="BITS", help="of all matrices but the head (4)")
    add("--head", type=int, default=8, metavar="BITS", help="of the last matrix (8)")
    add("--cache", type=int, default=8, metavar="BITS", help="of keys and values (8)")
    add("--group", type=int, default=0, metavar="N", help="weights that share a 16-bit scale (0: none counted)")
    parser.set_defaults(command=_predict)


def _predict(args: argparse.Namespace) -> int:
    from qtools.llm import decode
    from qtools.npu import soc

    try:
        model = _transformer(args.model) if args.model else decode.LLAMA2_7B
        bits = decode.Bits(args.weights, args.weights, args.head, args.cache, args.group)
        if not 1 <= args.prompt <= args.context:
            raise ValueError(f"the prompt must have between 1 and the context's {args.context} tokens")
        if min(bits[:4]) < 1 or args.group < 0:
            raise ValueError("bits are positive, and a group has 0 or more weights")
        chips = {key: (soc.chip(key), soc.rates(key, "w4a16")) for key in args.soc}
        read = decode.reads(model, args.context, bits)
        print(f"{read.total / 1e9:.3f} GB read for a token: weights {read.weights / 1e9:.3f}, "
              f"scales {read.scales / 1e9:.3f}, cache {read.cache / 1e9:.3f}")  # fmt: skip
        print(f"{'chip':<30} {'ms a token':>11} {'token/s':>8} {'at least ms':>12} {'first token, s':>15}")
        for chip, rates in chips.values():
            first, token = decode.seconds(model, rates, args.context, args.prompt, bits)
            least = 1e3 * decode.floor(model, rates.bandwidth, args.context, bits)
            print(f"{chip.name:<30} {1e3 * token:11.1f} {1 / token:8.2f} {least:12.1f} {first:15.2f}")
    except (ValueError, OSError) as error:
        print(f"qtools llm predict: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _transformer(folder: Path) -> Transformer:
    from qtools.llm.checkpoint import Config
    from qtools.llm.decode import Transformer

    path = folder / "config.json" if folder.is_dir() else folder
    try:
        config = Config.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no config.json of the Llama architecture: {error}") from None
    return Transformer(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )


def _scheme(text: str) -> dict[str, str]:
    from qtools.llm.formats import SCHEMES

    if text in SCHEMES:
        return dict(SCHEMES[text])
    try:
        content = json.loads(Path(text).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the scheme {text} is not JSON: {error}") from None
    except OSError:
        raise ValueError(f"there is no scheme {text!r}: it is one of {', '.join(SCHEMES)}, or a JSON file") from None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ValueError(f"the scheme {text} is no object of patterns and formats")
    return content


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, form = text.rpartition("=")
    if not equals:
        raise ValueError(f"{text!r} is no rule such as '*.down_proj.weight=int8 channel'")
    return pattern, form
