"""The space of networks: an encoder from nets to embeddings, a decoder back to nets that run.

NetSpace (ICPR 2022, section III) embeds a net's PRep. Here the encoder can also *ask* the net: its
answers to a few probe inputs (ProbeGen 2024) do not change when hidden units are permuted, which
the weights do. Both branches are as plain as they come, because plain generalised best to nets
never seen: chunks share one linear layer, and the answers pass through a single linear map.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import store
from .architectures import build, describe
from .functional import Batched, Nets
from .layout import to_prep


@dataclass(frozen=True)
class SpaceConfig:
    """Sizes of a NetSpace."""

    embedding: int = 128  # E, values in an embedding
    chunk: int = 128  # L, values in a chunk of the PRep
    chunk_features: int = 32  # what the encoder keeps of each chunk
    probes: int = 128  # M, inputs that the encoder asks a net about; 0: weights only
    weights: bool = True  # whether the encoder reads the weights
    learn_probes: bool = False  # train the probes too; slower, since nets answer them every step
    hidden: int = 256  # width of the decoder's hidden layer


@dataclass
class Features:
    """What the encoder reads of N nets of one architecture; computed once for a zoo.

    prep: [N, T, L] standardised weights, answers: [N, M·K + 1] answers to the probes; either is
    None in a space that doesn't read it.
    """

    prep: Tensor | None
    answers: Tensor | None

    def __getitem__(self, index) -> "Features":
        prep, answers = self.prep, self.answers
        return Features(
            None if prep is None else prep[index], None if answers is None else answers[index]
        )


class Encoder(nn.Module):
    """Features of nets -> embeddings [N, E].

    Args:
        config: sizes.
        chunks: T of each architecture.
        answers: M·K + 1, or 0 without probes.
    """

    def __init__(self, config: SpaceConfig, chunks: Sequence[int], answers: int):
        super().__init__()
        d = config.chunk_features
        if config.weights:
            self.chunk = nn.Linear(config.chunk, d)
            self.position = nn.ParameterList([torch.randn(t, d) * 0.02 for t in chunks])
            self.gather = nn.ModuleList([nn.Linear(t * d, config.embedding) for t in chunks])
        if answers:
            self.answers = nn.Linear(answers, config.embedding)

    def forward(self, features: Features, architecture: int = 0) -> Tensor:
        z = 0
        if features.prep is not None:
            h = F.leaky_relu(self.chunk(features.prep) + self.position[architecture])  # [N, T, d]
            z = z + self.gather[architecture](h.flatten(1))
        if features.answers is not None:
            z = z + self.answers(features.answers)
        return z


class Decoder(nn.Module):
    """Embeddings [N, E] -> rows [N, P] of a chosen architecture.

    One hidden layer for all architectures, one head for each, then a learned scale and bias per
    entry as in the paper. The bias starts at ``base``, a trained net, so that decoded nets work
    from the first step on.
    """

    def __init__(self, config: SpaceConfig, bases: Sequence[Tensor]):
        super().__init__()
        self.hidden = nn.Linear(config.embedding, config.hidden)
        self.heads = nn.ModuleList([nn.Linear(config.hidden, len(b), bias=False) for b in bases])
        self.bias = nn.ParameterList([base.clone() for base in bases])
        self.scale = nn.ParameterList([torch.full_like(b, float(b.std())) for b in bases])

    def forward(self, z: Tensor, architecture: int = 0) -> Tensor:
        h = F.leaky_relu(self.hidden(z))  # [N, hidden]
        rows = self.heads[architecture](h)  # [N, P]
        return torch.addcmul(self.bias[architecture], rows, self.scale[architecture])


class NetSpace(nn.Module):
    """An embedding space of one or several architectures.

    Args:
        modules: one module of each architecture.
        inputs: [S, ...] typical inputs; the probes start as M of them.
        config: sizes.
        seed: of the initialisation.

    Build it with `NetSpace.for_zoos`, which also measures the zoos' weight statistics.
    """

    def __init__(self, modules, inputs: Tensor, config: SpaceConfig | None = None, seed: int = 0):
        super().__init__()
        self.config = config = config or SpaceConfig()
        if not (config.weights or config.probes):
            raise ValueError("an encoder needs weights=True, or probes > 0, to read anything")
        self.batched = [Batched(module) for module in modules]
        sizes = [b.layout.size for b in self.batched]
        for a, size in enumerate(sizes):
            self.register_buffer(f"mean{a}", torch.zeros(size))
            self.register_buffer(f"std{a}", torch.ones(size))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            chosen = torch.randperm(len(inputs))[: config.probes]
            probes, answers = inputs[chosen].clone(), 0
            if config.probes:
                self.probes = nn.Parameter(probes, requires_grad=config.learn_probes)
                row = self.batched[0].layout.pack([self.batched[0].module])
                answers = self.batched[0](row, probes).numel() + 1
            chunks = [b.layout.chunks(config.chunk) for b in self.batched]
            self.encoder = Encoder(config, chunks, answers)
            bases = [b.layout.pack([b.module])[0] for b in self.batched]
            self.decoder = Decoder(config, bases)

    @classmethod
    def for_zoos(cls, zoos, inputs: Tensor, config: SpaceConfig | None = None, seed: int = 0):
        """A space for these training zoos, one per architecture (or a single zoo).

        Weights are standardised by the zoo's mean and spread per position; the decoder's bias
        starts at the zoo's best net by ``val_accuracy``, or its first where there is no score.
        """
        zoos = [zoos] if isinstance(zoos, Nets) else list(zoos)
        space = cls([zoo.module for zoo in zoos], inputs, config, seed)
        for a, zoo in enumerate(zoos):
            scores = getattr(zoo, "scores", {}).get("val_accuracy", torch.zeros(len(zoo)))
            with torch.no_grad():
                base = zoo.rows[scores.argmax()]
                space.decoder.bias[a].copy_(base)
                space.decoder.scale[a].fill_(base.std())
                getattr(space, f"mean{a}").copy_(zoo.rows.mean(0))
                if len(zoo) > 1:
                    getattr(space, f"std{a}").copy_(zoo.rows.std(0).clamp_min(1e-6))
        return space

    @property
    def architectures(self) -> list[str]:
        """Names of the architectures, in the order of their indices."""
        return [type(b.module).__name__ for b in self.batched]

    def features(self, rows: Tensor, architecture: int = 0, block: int = 64) -> Features:
        """What the encoder reads of packed nets: rows [N, P] -> Features."""
        prep = answers = None
        if self.config.weights:
            mean, std = getattr(self, f"mean{architecture}"), getattr(self, f"std{architecture}")
            chunks = self.batched[architecture].layout.chunks(self.config.chunk)
            prep = to_prep((rows - mean) / std, chunks, self.config.chunk)
        if self.config.probes:
            batched = self.batched[architecture]
            blocks = [batched(part, self.probes) for part in rows.split(block)]
            answers = normalised_answers(torch.cat(blocks))
        return Features(prep, answers)

    def encode(self, nets, architecture: int = 0) -> Tensor:
        """Embeddings [N, E] of `Nets`, packed rows [N, P], modules, or state dicts.

        Raises ValueError if the nets are not of the architecture.
        """
        layout = self.batched[architecture].layout
        if isinstance(nets, Nets):
            if nets.layout != layout:
                raise ValueError(
                    f"{nets!r} can't be encoded as {self.architectures[architecture]} of "
                    f"{layout.size} parameters: this space was built for other nets"
                )
            nets = nets.rows
        elif not isinstance(nets, Tensor):
            nets = layout.pack([nets] if isinstance(nets, nn.Module | dict) else nets)
        elif nets.dim() != 2 or nets.shape[1] != layout.size:
            raise ValueError(f"rows should be [N, {layout.size}], not {list(nets.shape)}")
        with torch.no_grad():
            return self.encoder(self.features(nets, architecture), architecture)

    def decode(self, z: Tensor, architecture: int = 0) -> Nets:
        """Nets of the architecture that embeddings z [N, E] (or one, [E]) stand for.

        Differentiable: gradients of anything the nets answer flow back to ``z``.
        """
        z = z[None] if z.dim() == 1 else z
        if z.dim() != 2 or z.shape[1] != self.config.embedding:
            raise ValueError(
                f"embeddings should be [N, {self.config.embedding}], not {list(z.shape)}"
            )
        return Nets(self.batched[architecture], self.decoder(z, architecture))

    def save(self, folder) -> None:
        """Write the space to ``folder`` (JSON and safetensors), atomically."""
        record = {
            "config": asdict(self.config),
            "architectures": [describe(b.module) for b in self.batched],
        }
        store.save(folder, "space", record, self.state_dict())

    @classmethod
    def load(cls, folder, modules=None) -> "NetSpace":
        """Read a space back; ``modules`` are needed for architectures that aren't registered."""
        record, state = store.load(folder, "space")
        modules = modules or [build(description) for description in record["architectures"]]
        config = SpaceConfig(**record["config"])
        inputs = state["probes"] if config.probes else torch.zeros(1)
        space = cls(modules, inputs, config)
        space.load_state_dict(state)
        return space


def normalised_answers(outputs: Tensor) -> Tensor:
    """Answers [N, M, K] -> [N, M·K + 1]: each net's own level and spread apart from its shape.

    Logits are centred over classes, which softmax ignores, then divided by their spread; the log of
    the spread is kept as the last value.
    """
    if outputs.shape[-1] > 1:
        outputs = outputs - outputs.mean(-1, keepdim=True)
    flat = outputs.flatten(1)
    spread = flat.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
    return torch.cat([flat / spread, spread.log()], dim=1)
