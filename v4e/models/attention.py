"""How Wan's attention is computed: diffusers' dispatcher, an explicit matmul, and folded text padding.

Legend: B batch, S DiT tokens, H heads, d head width, D = H * d, L text tokens, N vision tokens.

Folding. Wan pads a prompt to 512 tokens of zeros and attends to the padding. All pads go through the same text
embedder, so all have the same key k and value v, and n equal keys weigh exp(q.k) * n = exp(q.k + log n) together:
one pad with the bias log n stands for all of them. A batch whose longest prompt has L words then needs L + 1 text
tokens instead of 512. At real sizes the saving is small; in a small model padding is most of the cost.
"""

import logging
from typing import Literal, NamedTuple, get_args

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformer3DModel
from torch import Tensor

from v4e.errors import ConfigError
from v4e.nouns import TEXT_TOKENS

Attention = Literal["auto", "native", "matmul", "xformers", "flash", "sage"]
"""``auto`` is xformers where it works, else native; ``sage`` has no backward pass and is for inference alone."""
PACKAGES = {"xformers": "xformers", "flash": "flash-attn", "sage": "sageattention"}

log = logging.getLogger(__name__)
_said: set[str] = set()


class Context(NamedTuple):
    """What cross-attention attends to, handed opaquely through a stock block to the processors below.

    A named tuple, because DeepSpeed's hooks walk tuples and torch's checkpoint passes them on.

    Args:
        tokens_BLD: vision tokens, then text tokens.
        image_tokens: how many of them are vision tokens.
        bias_B11L: added to the text logits, fp32; None for none.
        memory: each attention's keys and values of these tokens, where they are met again; None to forget.
    """

    tokens_BLD: Tensor
    image_tokens: int
    bias_B11L: Tensor | None = None
    memory: dict[WanAttention, "Projected"] | None = None


class Projected(NamedTuple):
    """Keys and values [B, L, H, d] of a context's text, and those of its images if there are any."""

    text: tuple[Tensor, Tensor]
    images: tuple[Tensor, Tensor] | None


def fold_padding(text_BLE: Tensor, words_B: Tensor) -> tuple[Tensor, Tensor]:
    """Text with a single pad [B, L + 1, E], and the bias [B, 1, 1, L + 1] by which it stands for all of them.

    Args:
        text_BLE: text embeddings, zeros from ``words_B`` on.
        words_B: how many of the L tokens are real.
    """
    L = text_BLE.shape[1]
    position_L = torch.arange(L, device=text_BLE.device)
    bias_BL = torch.zeros(text_BLE.shape[:2], device=text_BLE.device)
    bias_BL = bias_BL.masked_fill(position_L >= words_B[:, None], -torch.inf)
    pads_B1 = (TEXT_TOKENS - words_B[:, None]).float().log()  # -inf where all 512 tokens are words
    return torch.nn.functional.pad(text_BLE, (0, 0, 0, 1)), torch.cat([bias_BL, pads_B1], dim=1)[:, None, None]


def matmul_attention(q_BSHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, spelled out: on a CPU its backward is faster than SDPA's at tiny sizes."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BLHd, v_BLHd))
    scores_BHSL = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias_B11L is not None:
        scores_BHSL = scores_BHSL + bias_B11L
    return (scores_BHSL.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


class Processor:
    """Wan's attention with any backend, and with :class:`Context` in cross-attention.

    The arithmetic is that of diffusers' ``WanAttnProcessor``; a plain tensor as context means 512 text tokens.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Context | None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        context = _unpack(encoder_hidden_states, hidden_states)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        (k, v), images = project(attn, context)
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        out = self._attend(q, k, v, context.bias_B11L)
        if images is not None:
            out = out + self._attend(q, *images)
        return attn.to_out[1](attn.to_out[0](out))

    def _attend(self, q_BSHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
        # Flash kernels take no bias and CUDA's SDPA only one in the query's dtype, too coarse for log n in bf16;
        # folded keys are few enough to be spelled out.
        if bias_B11L is not None or self.backend == "matmul":
            out = matmul_attention(q_BSHd, k_BLHd, v_BLHd, bias_B11L)
        else:
            out = dispatch_attention_fn(q_BSHd, k_BLHd, v_BLHd, backend=AttentionBackendName(self.backend))
        return out.flatten(2).type_as(q_BSHd)


def rotate(x_BSHd: Tensor, cos_1S1d: Tensor, sin_1S1d: Tensor) -> Tensor:
    """Turn pairs of channels by their position's angle (RoFormer, arXiv 2104.09864, eq. 34)."""
    even, odd = x_BSHd.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_1S1d[..., 0::2], sin_1S1d[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_BSHd)


def _unpack(context: Tensor | Context | None, own_tokens_BSD: Tensor) -> Context:
    """Self-attention attends to its own tokens; a plain tensor is laid out as diffusers does, text last."""
    if isinstance(context, Context):
        return context
    if context is None:
        return Context(own_tokens_BSD, 0)
    return Context(context, context.shape[1] - TEXT_TOKENS)


def project(attn: WanAttention, context: Context) -> Projected:
    """Keys and values, computed once where the context has a memory."""
    memory = {} if context.memory is None else context.memory
    if attn not in memory:
        image_BND, text_BLD = context.tokens_BLD.tensor_split([context.image_tokens], dim=1)
        text, images = _by_heads(attn, attn.norm_k(attn.to_k(text_BLD)), attn.to_v(text_BLD)), None
        if context.image_tokens:
            assert attn.add_k_proj is not None and attn.add_v_proj is not None
            images = _by_heads(attn, attn.norm_added_k(attn.add_k_proj(image_BND)), attn.add_v_proj(image_BND))
        memory[attn] = Projected(text, images)
    return memory[attn]


def _by_heads(attn: WanAttention, k_BLD: Tensor, v_BLD: Tensor) -> tuple[Tensor, Tensor]:
    return k_BLD.unflatten(2, (attn.heads, -1)), v_BLD.unflatten(2, (attn.heads, -1))


def install(model: WanTransformer3DModel, backend: Attention, fold_text_padding: bool) -> None:
    """Give every attention of ``model`` its processor. Native without folding keeps diffusers' own, to the bit.

    Raises:
        ConfigError: the backend is unknown, or does not work on this machine.
    """
    name = resolve(backend)
    if name != "matmul" and not fold_text_padding:
        processor = WanAttnProcessor()
        processor._attention_backend = AttentionBackendName(name)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        processor = Processor(name)
    for module in model.modules():
        if isinstance(module, WanAttention):
            module.set_processor(processor)  # pyright: ignore[reportArgumentType] (the declared union is closed)


def resolve(backend: Attention) -> str:
    """The backend to use: ``auto`` is xformers where it works, else native; it says once which."""
    if backend not in get_args(Attention):
        raise ConfigError(f"unknown attention backend {backend!r}", fix=f"use one of {', '.join(get_args(Attention))}")
    if backend == "auto":
        return _automatic()
    if backend in PACKAGES and (fault := _fault(backend)):
        raise ConfigError(
            f"attention backend {backend!r} does not work on this machine: {fault}",
            fix=f"install {PACKAGES[backend]} for this torch and GPU, or use attention=auto",
        )
    return backend


def _automatic() -> str:
    fault = _fault("xformers")
    name = "native" if fault else "xformers"
    if name not in _said:
        _said.add(name)
        log.info("attention=auto uses %s%s", name, f" (xformers: {fault})" if fault else "")
    return name


def _fault(backend: str) -> str:
    """Why a backend does not work here, found by running it once on a small CUDA tensor; empty when it does."""
    if not torch.cuda.is_available():
        return "it has no operator without CUDA"
    try:
        with attention_backend(backend):
            x_BSHd = torch.randn(1, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
            dispatch_attention_fn(x_BSHd, x_BSHd, x_BSHd)
    except Exception as error:  # import errors, missing operators and driver faults are all the same answer: no
        return str(error).splitlines()[0]
    return ""
