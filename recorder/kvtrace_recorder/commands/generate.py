"""Load a model, generate from prompts and record it.

MODEL is a directory with a transformers model and tokenizer, or a name on the model hub; `demo`
is the model that comes with kvtrace. Several prompts run as one batch.

Example: kvtrace generate demo --prompt "The list is" --prompt "A function" --out run.kvtrace
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from kvtrace.errors import InputError
from kvtrace.ranks import check_new_path
from kvtrace_recorder.commands.options import add_recording_options, kept
from kvtrace_recorder.commands.summary import quiet, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="a directory, a hub name, or demo")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="repeatable")
    parser.add_argument(
        "--prompt-file", metavar="F", action="append", default=[], help="one prompt a file"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="default: 128")
    parser.add_argument(
        "--sample", action="store_true", help="sample; default: the likeliest token"
    )
    parser.add_argument("--temperature", metavar="X", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the sampling")
    parser.add_argument(
        "--attention",
        metavar="KERNEL",
        help="transformers' attn_implementation, such as eager or sdpa (default: the model's)",
    )
    add_recording_options(parser, out="default: traces/MODEL-TIME.kvtrace")


def run(args: argparse.Namespace) -> int:
    """Generate and record."""
    prompts = [*args.prompt, *(_read(Path(name)) for name in args.prompt_file)]
    kept(args)
    if not prompts or not all(prompts):
        raise InputError(
            "no prompt, or an empty one; --prompt TEXT or --prompt-file F was expected"
        )
    if args.max_new_tokens < 1 or args.temperature <= 0:
        raise InputError(
            f"--max-new-tokens {args.max_new_tokens} and --temperature {args.temperature};"
            " numbers above 0 were expected"
        )
    name = Path(args.model).name
    out = Path(args.out or f"traces/{name}-{time.strftime('%Y%m%d-%H%M%S')}.kvtrace")
    check_new_path(out, force=args.force)
    model, tokenizer = load_model(args.model, args.attention)
    texts = _generate(model, tokenizer, prompts, args, out)
    for number, text in enumerate(texts, start=1):
        print(text if len(texts) == 1 else f"[{number}] {text}")
    print(summary(out), file=sys.stderr)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); a UTF-8 text was expected") from error


def _generate(
    model: Any, tokenizer: Any, prompts: list[str], args: argparse.Namespace, out: Path
) -> list[str]:
    import torch

    from kvtrace_recorder.session.recording import record

    # Decoding goes on at the right end, so the padding of a batch stands on the left.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1).to(model.device)
    batch.pop("token_type_ids", None)
    torch.manual_seed(args.seed)
    options = {"temperature": args.temperature} if args.sample else {}
    with record(
        model,
        out,
        **kept(args),
        tokenizer=tokenizer,
        force=args.force,
        on_full="wait",
        command=["kvtrace", "generate", args.model],
    ):
        tokens = model.generate(
            **batch,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.sample,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def load_model(name: str, attention: str | None) -> tuple[Any, Any]:
    """Load a causal model in evaluation mode, and its tokenizer.

    Parameters
    ----------
    name : str
        A directory, a hub name, or demo.
    attention : str or None
        transformers' attn_implementation; None: the model's own choice.

    Raises
    ------
    InputError
        Where it cannot be reached or loaded.
    """
    if name == "demo" and not Path(name).exists():
        from kvtrace_recorder.demo import MODEL_DIR

        name = str(MODEL_DIR)
    _check_reachable(name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **options)
    except (OSError, ValueError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} could not be loaded ({first}); a transformers causal model and its tokenizer"
            " were expected"
        ) from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _check_reachable(name: str) -> None:
    """Refuse at once what the hub's client would retry for a minute.

    Raises
    ------
    InputError
        For a path that is no directory, and for a hub name while the hub cannot be reached.
    """
    if Path(name).is_dir():
        return
    if name.startswith((".", "/", "~")):
        raise InputError(f"{name} is no directory; a model directory was expected; check the path")
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = {repo.repo_id for repo in scan_cache_dir().repos}
    except CacheNotFound:
        cached = set()
    hub = urlsplit(constants.ENDPOINT)
    # Behind a proxy only the client itself can find out.
    if name in cached or getproxies():
        return
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
    except OSError as error:
        raise InputError(
            f"{name} is no directory here, and the model hub {hub.hostname} cannot be reached"
            f" ({error}); a model directory, a hub name that can be reached, or demo was expected"
        ) from error
