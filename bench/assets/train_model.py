# SPDX-License-Identifier: Apache-2.0
"""Train the demo's language model: a byte-level Llama on Python that is not the standard library.

Text: every package of an installed site-packages, minus tests, vendored code, copies and backports
of the standard library, near-copies of files already taken and packages under a copyleft licence.
Whole packages are held out for validation. Token id = byte value; byte 0xFF, which UTF-8 never
contains, is the end-of-text token. Written: a Hugging Face checkpoint (float16), MODEL_CARD.md and
corpus.csv. A run needs one GPU and eight minutes; `--steps 3 --device cpu` only checks the path.

Score: BPB = bits of the scored tokens / bytes they spell, over disjoint windows; the first byte of
a window is context only.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

END_OF_TEXT = 255
CONTEXT = 1024
HELD_OUT = ("networkx", "seaborn", "werkzeug", "humanize", "sortedcontainers", "timm")
SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "vendor", "vendored", "_vendored"}
SKIPPED_FOLDERS |= {"third_party", "externals", "_distutils", "backports", "_backport"}
# Packages that are, or carry, standard-library modules under another name.
SKIPPED_PACKAGES = {"setuptools", "pkg_resources", "_distutils_hack", "distutils", "pip", "wheel"}
SKIPPED_PACKAGES |= {"typing_extensions", "importlib_metadata", "importlib_resources", "zipp"}
SKIPPED_PACKAGES |= {"six", "simplejson", "exceptiongroup", "tomli", "backports", "cloudpickle"}
SKIPPED_PACKAGES |= {"dill", "pathlib2", "contextlib2", "mypy", "mypyc", "multiprocess"}
COPYLEFT = ("gpl", "general public", "mozilla", "mpl")


@dataclass
class Corpus:
    """Two byte streams (documents joined by END_OF_TEXT) and what they were made of."""

    train: np.ndarray
    held_out: list[bytes]
    rows: list[tuple[str, str, int, int, str]]  # package, split, files, bytes, licence


def line_windows(text: str) -> list[int]:
    """Hashes of every three consecutive non-blank lines, by which copies are recognised."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [hash((lines[i], lines[i + 1], lines[i + 2])) for i in range(len(lines) - 2)]


def read_sources(folder: Path) -> list[tuple[Path, str]]:
    """Python files of a package (or the one module `folder` is), less tests and vendored code."""
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
    sources = []
    for path in paths:
        if SKIPPED_FOLDERS & {part.lower() for part in path.relative_to(folder.parent).parts}:
            continue
        if path.name.startswith("test_") or not 300 <= path.stat().st_size <= 300_000:
            continue
        try:
            sources.append((path, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return sources


def stdlib_sources() -> list[tuple[Path, str]]:
    """The running interpreter's standard library, tests and site-packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for entry in sorted(root.iterdir()):
        skipped = entry.name in {"site-packages", "dist-packages", "test", "idlelib"}
        if not skipped and (entry.is_dir() or entry.suffix == ".py"):
            sources += read_sources(entry)
    return sources


def licences(site_packages: Path) -> dict[str, str]:
    """Import name -> licence, as the installed metadata states it."""
    found = {}
    for dist in importlib.metadata.distributions(path=[str(site_packages)]):
        meta = dist.metadata
        classifiers = [c for c in meta.get_all("Classifier") or [] if c.startswith("License")]
        stated = meta.get("License-Expression")
        stated = stated or "; ".join(c.split(" :: ")[-1] for c in classifiers)
        stated = stated or (meta.get("License") or "").split("\n")[0]  # the rest is the full text
        for file in dist.files or []:
            if file.suffix == ".py":
                found.setdefault(file.parts[0].removesuffix(".py"), stated)
    return found


def build_corpus(site_packages: Path, held_out: tuple[str, ...]) -> Corpus:
    """Collect, filter and split the packages under `site_packages`."""
    stdlib_windows = {w for _, text in stdlib_sources() for w in line_windows(text)}
    licence_of = licences(site_packages)
    stdlib_names = sys.stdlib_module_names | SKIPPED_PACKAGES
    seen: set[int] = set()
    train: list[bytes] = []
    validation: list[bytes] = []
    rows = []
    entries = [e for e in sorted(site_packages.iterdir()) if e.is_dir() or e.suffix == ".py"]
    # Held-out packages first: then it is the training file that is dropped if one copies the other.
    entries.sort(key=lambda e: e.stem not in held_out)
    for entry in tqdm(entries, desc="reading packages", unit="package"):
        name, licence = entry.stem, licence_of.get(entry.stem, "")
        if name in stdlib_names or any(word in licence.lower() for word in COPYLEFT):
            continue
        if entry.suffix in {".dist-info", ".libs", ".egg-info"} or not licence:
            continue
        files = size = 0
        for _, text in read_sources(entry):
            windows = line_windows(text)
            if not windows:
                continue
            from_stdlib = sum(w in stdlib_windows for w in windows)
            from_others = sum(w in seen for w in windows)
            if from_stdlib > 0.1 * len(windows) or from_others > 0.5 * len(windows):
                continue
            seen.update(windows)
            document = text.encode()
            (validation if name in held_out else train).append(document)
            files, size = files + 1, size + len(document)
        if files:
            split = "held-out" if name in held_out else "train"
            rows.append((name, split, files, size, licence))
    if not train or not validation:
        raise SystemExit(
            f"site-packages: expected sources for both splits under {site_packages}, got "
            f"{len(train)} training and {len(validation)} held-out files (held out: {held_out})"
        )
    stream = np.frombuffer(bytes([END_OF_TEXT]).join(train), dtype=np.uint8)
    return Corpus(stream.copy(), validation, rows)


def windows_of(documents: list[bytes], limit: int) -> torch.Tensor:
    """At most `limit` disjoint windows, spread evenly over the documents. [w, CONTEXT] uint8"""
    rows = [
        np.frombuffer(doc, dtype=np.uint8, count=CONTEXT, offset=start)
        for doc in documents
        for start in range(0, len(doc) - CONTEXT + 1, CONTEXT)
    ]
    return torch.from_numpy(np.stack(rows[:: max(1, len(rows) // limit)][:limit]))


def token_nll(model: LlamaForCausalLM, tokens: torch.Tensor, reduction: str) -> torch.Tensor:
    """Next-byte cross entropy in nats. tokens: [b, T + 1] int64."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """BPB over the windows; every token but a window's first is scored and spells one byte."""
    device = next(model.parameters()).device
    bits = sum(
        token_nll(model, rows.to(device, torch.int64), "sum").item() / math.log(2)
        for rows in windows.split(64)
    )
    return bits / (windows.shape[0] * (windows.shape[1] - 1))


def build_model() -> LlamaForCausalLM:
    """4.0M parameters: a forward-backward pass of 512 bytes takes a fraction of a CPU second."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, stream: np.ndarray, args: argparse.Namespace) -> float:
    """AdamW, linear warm-up then cosine to zero, random windows. Returns the seconds it took."""
    device = torch.device(args.device)
    data = torch.from_numpy(stream).to(device)
    offsets = torch.arange(CONTEXT + 1, device=device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    warmup = min(500, args.steps // 10 + 1)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return token_nll(model, tokens, "mean")

    if device.type == "cuda":
        loss_of = torch.compile(loss_of)
    began = time.perf_counter()
    progress = tqdm(range(args.steps), desc="training", unit="step", mininterval=5)
    for step in progress:
        start = torch.randint(len(data) - CONTEXT, (args.batch, 1), device=device)
        loss = loss_of(data[start + offsets].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:  # reading the loss synchronises, so seldom
            progress.set_postfix(bpb=f"{loss.item() / math.log(2):.3f}")
    if not math.isfinite(loss.item()):
        raise SystemExit("training diverged: the last loss is not finite; lower --lr")
    return time.perf_counter() - began


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose ids are byte values, in files that transformers 4.5x and 5.x both read."""
    # ByteLevel's stand-ins: printable Latin-1 bytes stand for themselves, the others move up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in printable]
    symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(moved)}
    symbol[END_OF_TEXT] = "<|endoftext|>"
    vocab = {symbol[b]: b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2 * CONTEXT,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def model_card(
    args: argparse.Namespace, corpus: Corpus, bpb: dict[str, float], spent: float
) -> str:
    """What a reader must know to trust or repeat the checkpoint."""
    cuda = args.device == "cuda"
    hardware = f"one {torch.cuda.get_device_name()}" if cuda else platform.processor() or "CPU"
    held = sum(map(len, corpus.held_out))
    scores = "\n".join(f"| {name} | {value:.3f} |" for name, value in bpb.items())
    seen = args.steps * args.batch * CONTEXT / 1e9
    size = sum(p.numel() for p in build_model().parameters()) / 1e6
    return f"""# pybytes: the demo's byte-level language model

A {size:.1f}M-parameter Llama over bytes (token id = byte value, 0xFF = end of text), context
{CONTEXT}, stored in float16. It exists so that `make demo` has a real model to adapt without a
download; it is no general-purpose model.

| text | BPB |
|---|---|
{scores}

BPB = bits of the scored tokens / bytes they spell; disjoint {CONTEXT}-byte windows, first byte not
scored, float32, unadapted. The standard library is that of Python {platform.python_version()},
without its tests.

- Text: Python sources of an installed site-packages ({len(corpus.train):,} training bytes,
  {held:,} held-out bytes), split by whole package; `corpus.csv` names every package with its
  licence as its metadata states it. Left out: tests, vendored code, backports, packages stating a
  copyleft licence, and every file that shares more than 10 % of its three-line windows with the
  standard library.
- Training: `{args.command}`
  ({args.steps:,} steps of {args.batch} x {CONTEXT} bytes, {seen:.2f} GB read, AdamW with peak lr
  {args.lr:g}, cosine, bf16) in {spent:.0f} s on {hardware}, torch {torch.__version__},
  {datetime.date.today().isoformat()}.
- SHA-256 of the training stream:
  `{hashlib.sha256(corpus.train).hexdigest()}`.
- Licence: Apache-2.0, like the rest of the repository. The training packages keep their own
  licences; none of their text is distributed here.
"""


def main(argv: list[str] | None = None) -> None:
    """Build the corpus, train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--site-packages", type=Path, default=Path(np.__file__).parents[1])
    parser.add_argument("--held-out", nargs="+", default=HELD_OUT, metavar="PACKAGE")
    parser.add_argument("--out", type=Path, default=Path("bench/assets/pybytes"))
    parser.add_argument("--steps", type=int, default=17_500)
    parser.add_argument("--batch", type=int, default=128, help="windows a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    options = f"--steps {args.steps} --batch {args.batch} --lr {args.lr:g} --device {args.device}"
    args.command = f"python -m bench.assets.train_model {options}"

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    corpus = build_corpus(args.site_packages, tuple(args.held_out))
    print(f"{len(corpus.train):,} training bytes, {sum(map(len, corpus.held_out)):,} held out")
    for row in sorted(corpus.rows, key=lambda row: -row[3])[:12]:
        print(*row, sep="\t")
    model = build_model().to(args.device)
    spent = train(model, corpus.train, args)

    model = model.half().float()  # score what is stored
    texts = {"held-out packages": corpus.held_out, "standard library": []}
    texts["standard library"] = [text.encode() for _, text in stdlib_sources()]
    windows = min(2048, 64 * args.steps)
    bpb = {name: bits_per_byte(model, windows_of(docs, windows)) for name, docs in texts.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    (args.out / "generation_config.json").unlink(missing_ok=True)
    save_tokenizer(args.out)
    (args.out / "MODEL_CARD.md").write_text(model_card(args, corpus, bpb, spent))
    with (args.out / "corpus.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("package", "split", "files", "bytes", "licence"))
        writer.writerows(corpus.rows)
    print(f"{spent:.0f} s; " + "; ".join(f"{k}: {v:.3f} BPB" for k, v in bpb.items()))


if __name__ == "__main__":
    main()
