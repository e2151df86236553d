"""Wan's blocks for inference in fp32 on a CPU: the same sums by oneDNN, in fewer passes.

torch gives a matrix product in fp32 to MKL, which on a processor that is not Intel's leaves half of the vector width
unused, and only one in bf16 to oneDNN. Here oneDNN takes both, by the operators that ``torch.compile`` emits, with the
weights in its own layout. A noise level that the whole batch shares makes every modulation the weight and bias of a
norm. The last bits are others than the plain blocks'.

Legend: B batch, S DiT tokens, D width, L vision tokens, words and their pad, H heads, d head width.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from v4e.errors import ConfigError
from v4e.models.attention import Context, project

TOKENS = 1024  # at most so many, or one sample's, go through the blocks together: they stay in a core's cache


def require_onednn(device: torch.device) -> None:
    """ConfigError where oneDNN cannot work."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        fault = f"oneDNN works on a CPU, not on {device}" if device.type != "cpu" else "this torch has no oneDNN"
        raise ConfigError(fault, where="key onednn", fix="leave onednn out")


class Linears(NamedTuple):
    """Linear layers of one input, side by side."""

    weight: Tensor
    bias: Tensor

    @staticmethod
    def of(*layers: nn.Module) -> "Linears":
        """Lay out the weights; later changes of them are not seen.

        Raises:
            ConfigError: one is not a plain linear layer in fp32 on a CPU.
        """
        plain = [layer for layer in layers if type(layer) is nn.Linear and layer.weight.dtype == torch.float32]
        if len(plain) < len(layers):
            raise ConfigError("oneDNN takes plain layers in fp32", where="key onednn", fix="leave onednn out")
        require_onednn(plain[0].weight.device)
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat([layer.weight.detach() for layer in plain]), TOKENS)
        return Linears(weight, torch.cat([layer.bias.detach() for layer in plain]))

    def __call__(self, x: Tensor, then: str = "none", kind: str = "") -> Tensor:
        """The layers' outputs, next to each other; ``then`` is done to each number before it leaves the registers."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], kind)


class Told(NamedTuple):
    """What a block's cross-attention attends to, the same at every noise level: pictures, then words.

    Args:
        k_BHdL, v_BHLd: keys, scaled, and values of both.
        images: how many of the L are of pictures; they and the words each have a softmax of their own.
    """

    k_BHdL: Tensor
    v_BHLd: Tensor
    images: int
    bias_B11L: Tensor | None

    @staticmethod
    def of(attn: WanAttention, context: Context) -> "Told":
        text, images = project(attn, context)
        k_BLHd, v_BLHd = text if images is None else (torch.cat(pair, dim=1) for pair in zip(images, text, strict=True))
        k_BHdL = (k_BLHd * k_BLHd.shape[-1] ** -0.5).permute(0, 2, 3, 1).contiguous()
        return Told(k_BHdL, v_BLHd.transpose(1, 2).contiguous(), context.image_tokens, context.bias_B11L)

    def part(self, rows: slice) -> "Told":
        bias = None if self.bias_B11L is None else self.bias_B11L[rows]
        return Told(self.k_BHdL[rows], self.v_BHLd[rows], self.images, bias)

    def attend(self, q_BSHd: Tensor) -> Tensor:
        pictures, words = (q_BSHd.transpose(1, 2) @ self.k_BHdL).tensor_split([self.images], dim=-1)
        words = words if self.bias_B11L is None else words + self.bias_B11L
        weights_BHSL = torch.cat([pictures.softmax(-1), words.softmax(-1)], dim=-1)
        return (weights_BHSL @ self.v_BHLd).transpose(1, 2).flatten(2)


class OneDnnBlocks:
    """All blocks of a Wan, for one roll-out: it remembers each context, and the last state."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.blocks = [_Block(block) for block in blocks]
        self._told: dict[int, tuple[Context, list[Told]]] = {}
        self._begun: list[Tensor] = []

    def __call__(
        self,
        h_BSD: Tensor,
        context: Context,
        modulation_16D: Tensor,
        rotary: tuple[Tensor, Tensor],
        again: bool = False,
    ) -> Tensor:
        """Hidden states [B, S, D] after the last block.

        Args:
            modulation_16D: of the one noise level that the batch shares.
            again: all but the context is what it was in the last call, as guidance asks; then the first block's
                self-attention, which comes before any context, is too.
        """
        turn, modulations = as_complex(rotary), [block.modulation(modulation_16D) for block in self.blocks]
        size = max(1, TOKENS // h_BSD.shape[1])
        if not again:
            self._begun = [self.blocks[0].attend(h, modulations[0], turn) for h in h_BSD.split(size)]
        told = self._told_of(context)
        return torch.cat([
            self._run(h.clone(), [each.part(slice(i * size, (i + 1) * size)) for each in told], modulations, turn)
            for i, h in enumerate(self._begun)
        ])  # fmt: skip

    def _told_of(self, context: Context) -> list[Told]:
        if id(context) not in self._told:  # the context is held, so that its id is not given to another
            self._told[id(context)] = context, [Told.of(block.cross, context) for block in self.blocks]
        return self._told[id(context)][1]

    def _run(self, h_BSD: Tensor, told: list[Told], modulations: list[Tensor], turn: Tensor) -> Tensor:
        """All that comes after the first block's self-attention; writes into ``h_BSD``."""
        for i, (block, modulation_6D) in enumerate(zip(self.blocks, modulations, strict=True)):
            h_BSD = block.attend(h_BSD, modulation_6D, turn) if i else h_BSD
            h_BSD = block.look_and_think(h_BSD, told[i], modulation_6D)
        return h_BSD


class _Block:
    """A ``WanTransformerBlock`` in two halves; the numbers are those of its forward."""

    def __init__(self, block: nn.Module) -> None:
        assert isinstance(block, WanTransformerBlock)
        own, cross, (rise, _, fall) = block.attn1, block.attn2, block.ffn.net
        self.block, self.own, self.cross = block, own, cross
        self.own_in, self.own_out = Linears.of(own.to_q, own.to_k, own.to_v), Linears.of(own.to_out[0])
        self.cross_in, self.cross_out = Linears.of(cross.to_q), Linears.of(cross.to_out[0])
        self.rise, self.fall = Linears.of(rise.get_submodule("proj")), Linears.of(fall)

    def modulation(self, modulation_16D: Tensor) -> Tensor:
        """Shift, scale and gate of self-attention, then those of the feed-forward [6, D]; scales with their one."""
        table_6D = (self.block.scale_shift_table + modulation_16D)[0]
        table_6D[1::3] += 1
        return table_6D

    def attend(self, h_BSD: Tensor, modulation_6D: Tensor, turn: Tensor) -> Tensor:
        """1. Self-attention."""
        shift, scale, gate = modulation_6D[:3]
        q, k, v = (self._heads(x) for x in self.own_in(self._norm(h_BSD, scale, shift)).chunk(3, dim=-1))
        q, k = _turned(self._scaled(self.own.norm_q, q), turn), _turned(self._scaled(self.own.norm_k, k), turn)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return h_BSD.addcmul(self.own_out(out.transpose(1, 2).flatten(2)), gate)

    def look_and_think(self, h_BSD: Tensor, told: Told, modulation_6D: Tensor) -> Tensor:
        """2. Cross-attention, 3. Feed-forward; both are added to ``h_BSD`` itself."""
        shift, scale, gate = modulation_6D[3:]
        q = self._scaled(self.cross.norm_q, self._heads(self.cross_in(self.block.norm2(h_BSD))))
        h_BSD += self.cross_out(told.attend(q))
        return h_BSD.addcmul_(self.fall(self.rise(self._norm(h_BSD, scale, shift), "gelu", "tanh")), gate)

    def _norm(self, h_BSD: Tensor, scale_D: Tensor, shift_D: Tensor) -> Tensor:
        return F.layer_norm(h_BSD, scale_D.shape, scale_D, shift_D, self.block.norm1.eps)

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.own.heads, -1))

    def _scaled(self, norm: nn.Module, x_BSHd: Tensor) -> Tensor:
        """Wan's norm of queries and keys goes across the heads."""
        return self._heads(norm(x_BSHd.flatten(-2)))


def as_complex(rotary: tuple[Tensor, Tensor]) -> Tensor:
    """A rotary table as complex numbers [S, 1, d / 2]: to turn a pair of channels is then one product."""
    cos_1S1d, sin_1S1d = rotary
    return torch.complex(cos_1S1d[0, ..., 0::2], sin_1S1d[0, ..., 1::2])


def _turned(x_BSHd: Tensor, turn: Tensor) -> Tensor:
    """:func:`v4e.models.attention.rotate` in one pass."""
    return torch.view_as_real(torch.view_as_complex(x_BSHd.unflatten(-1, (-1, 2))) * turn).flatten(-2)
