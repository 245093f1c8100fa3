"""The losses over the vocabulary of other packages, if these are installed.

TRL's kernel file imports its trainer, which needs far more packages than the kernel. Therefore only
the two files of the kernel are loaded, from a wheel or an installed trl, with a stub for the one
function of the trainer that they use.
"""

import importlib.util
import inspect
import sys
import types
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from email import message_from_bytes
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def available(trl: Path | None) -> dict[str, Callable[[Any], object]]:
    """The losses of installed packages by name, as functions of a benchmarks.head.Problem.

    Args:
        trl: a wheel of TRL; None: an installed trl, if there is one.
    """
    peers: dict[str, Callable[[Any], object]] = {}
    if trl is not None or importlib.util.find_spec("trl"):
        peers["TRL ChunkedDivergence bf16 dense"] = _trl(trl)
    if importlib.util.find_spec("liger_kernel"):
        peers |= _liger()
    return peers


def versions(trl: Path | None) -> dict[str, str]:
    """The version of a wheel. The versions of installed packages are in the machine's
    description.
    """
    if trl is None:
        return {}
    with zipfile.ZipFile(trl) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return {"trl": message_from_bytes(archive.read(name))["Version"]}


def _trl(wheel: Path | None) -> Callable[[Any], object]:
    kernel = _trl_kernels(wheel).ChunkedDivergenceFunction

    def call(p: Any) -> None:
        kernel.apply(p.hidden, p.lm_head, None, p.teacher_hidden, p.teacher_head, None, 1.0)[
            0
        ].mean().backward()  # 1.0: KL(p || q)

    return call


def _trl_kernels(wheel: Path | None) -> types.ModuleType:
    """The module trl.kernels.chunked_divergence, imported under another name."""
    name = "benchmarked_trl"
    if f"{name}.kernels.chunked_divergence" in sys.modules:
        return sys.modules[f"{name}.kernels.chunked_divergence"]
    for package in (name, f"{name}.kernels", f"{name}.trainer"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    utils = types.ModuleType(f"{name}.trainer.utils")
    # The original gathers ZeRO-3 shards, which do not exist here.
    vars(utils)["maybe_gather_lm_head_ctx"] = lambda *_: nullcontext()
    sys.modules[utils.__name__] = utils
    for part in ("chunked_logprob", "chunked_divergence"):
        file = _trl_file(wheel, f"trl/kernels/{part}.py")
        spec = importlib.util.spec_from_file_location(f"{name}.kernels.{part}", file)
        assert spec is not None and spec.loader is not None, file
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module


def _trl_file(wheel: Path | None, name: str) -> Path:
    """The path of a file of trl. Triton reads the source of kernels from files, so a file of a
    wheel is extracted next to it.
    """
    if wheel is None:
        return Path(str(metadata.distribution("trl").locate_file(name)))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(name, wheel.with_suffix(".files")))


def _liger() -> dict[str, Callable[[Any], object]]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss
    from liger_kernel.transformers import LigerFusedLinearJSD

    chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    wide = (
        {"accum_dtype": torch.float32}
        if "accum_dtype" in inspect.signature(LigerFusedLinearJSD).parameters
        else {}
    )
    in_kernel = LigerFusedLinearJSD(jsd_beta=1.0, **wide)
    # chunk_size counts sequences, and is 1 by default.
    policy = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=1024)

    def distil(p: Any) -> torch.Tensor:
        return chunked(p.hidden, p.lm_head, p.teacher_hidden, p.teacher_head, p.ids)

    def reinforce(p: Any) -> torch.Tensor:
        """The loss of tokens that are each a sequence, with minus their cost as advantage."""
        mask = torch.ones_like(p.ids)[:, None]
        return policy(p.hidden[:, None], p.lm_head, p.ids[:, None], mask, -p.cost)[0]

    return {
        "Liger FusedLinearJSDLoss bf16 dense": lambda p: distil(p).backward(),
        "Liger FusedLinearJSD bf16 dense": lambda p: in_kernel(
            p.hidden, p.lm_head, p.teacher_hidden, p.teacher_head, None
        ).backward(),
        "Liger JSDLoss + GRPOLoss bf16 hybrid": lambda p: (distil(p) + reinforce(p)).backward(),
    }
