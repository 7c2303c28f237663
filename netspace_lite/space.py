"""The space of networks: an encoder from nets to embeddings, a decoder back to nets that run.

NetSpace (ICPR 2022, section III) embeds a net's PRep. Here the encoder can also *ask* the net: its
answers to a few probe inputs (ProbeGen 2024) do not change when hidden units are permuted, which
the weights do. Both branches are as plain as they come, because plain generalised best to nets
never seen: chunks share one linear layer, and the answers' principal components pass through a
single linear map.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from . import store
from .architectures import build, describe, listed, name_of
from .batching import BLOCK, TOKENS, Batched
from .checks import check_finite, check_kind
from .folding import fold_batchnorm
from .kernels import chunk_pack
from .layout import check_rows, invariants
from .nets import MixedNets, Nets, as_answers, members_of, packed
from .paper import ConvDecoder, ConvEncoder
from .randomness import ALONE, own_randomness


@dataclass(frozen=True)
class SpaceConfig:
    """Sizes of a NetSpace.

    Args:
        embedding: E, values in an embedding.
        chunk: L, values in a chunk of the PRep.
        chunk_features: what the encoder keeps of each chunk.
        probes: M, inputs that a net is asked about, or all there are; 0: weights only.
        components: how many principal components of answers are read; 0: answers themselves.
        weights: whether the encoder reads the weights, in chunks or as "invariants".
        learn_probes: train the probes, too; slower, since nets answer them in every step.
        told: whether the encoder knows each net's architecture, and adds its offset.
        hidden: width of the decoder's hidden layer.
        parts: "ours", or "paper": the authors' encoder and decoder, see `netspace_lite.paper`.
        values: whether nets answer values, which count as they are and are compared by their
            squared error, instead of logits, whose mean over the classes says nothing.

    Raises ValueError for a size or a name that there is not.
    """

    embedding: int = 128
    chunk: int = 128
    chunk_features: int = 32
    probes: int = 128
    components: int = 0
    weights: bool | str = True
    learn_probes: bool = False
    told: bool = True
    hidden: int = 256
    parts: str = "ours"
    values: bool = False

    def __post_init__(self):
        known = {"parts": ("ours", "paper"), "weights": (True, False, "invariants")}
        known |= dict.fromkeys(("told", "learn_probes", "values"), (True, False))
        for name, given in asdict(self).items():
            if hasattr(given, "item"):  # a NumPy number, which JSON does not take
                vars(self)[name] = given = given.item()
            least = int(name not in ("probes", "components"))
            if name in known and given not in known[name]:
                raise ValueError(f"{name} should be one of {known[name]}, not {given!r}")
            if name not in known and not (type(given) is int and given >= least):
                raise ValueError(f"SpaceConfig.{name} is a number from {least}, not {given!r}")
        if not (self.weights or self.probes):
            raise ValueError("an encoder needs weights=True, or probes > 0, to read anything")


@dataclass
class Features:
    """What the encoder reads of N nets of one architecture; computed once for a zoo.

    prep: [N, T, L] standardised weights, or [N, 1, F] of their `invariants`; answers: [N, M·K + 1]
    answers to the probes. Either is None in a space that doesn't read it.
    """

    prep: Tensor | None
    answers: Tensor | None

    def __getitem__(self, index) -> "Features":
        parts = self.prep, self.answers
        return Features(*(None if part is None else part[index] for part in parts))


class Encoder(nn.Module):
    """Features of nets -> embeddings [N, E].

    Args:
        config: sizes.
        shapes: (T, L) of each architecture, or (1, F).
        answers: M·K + 1, or 0 without probes.
    """

    def __init__(self, config: SpaceConfig, shapes: Sequence[tuple[int, int]], answers: int):
        super().__init__()
        d, self.chunk = config.chunk_features, None
        if config.weights == "invariants":
            self.gather = nn.ModuleList([nn.Linear(f, config.embedding) for _, f in shapes])
        elif config.weights:
            self.chunk = nn.Linear(config.chunk, d)
            self.position = nn.ParameterList([torch.randn(t, d) * 0.02 for t, _ in shapes])
            self.gather = nn.ModuleList([nn.Linear(t * d, config.embedding) for t, _ in shapes])
        if answers:
            kept, axes, centre = answers, None, None
            if config.components:  # any axes, until `read_along` knows the zoo's
                kept = min(config.components, answers)
                axes, centre = torch.linalg.qr(torch.randn(answers, kept)).Q, torch.zeros(answers)
            self.register_buffer("axes", axes)
            self.register_buffer("centre", centre)
            self.answers = nn.Linear(kept, config.embedding)
        self.offset = None
        if config.told and len(shapes) > 1:  # where each architecture lies at first: in a row
            order = torch.arange(len(shapes))[:, None] - (len(shapes) - 1) / 2
            way = F.normalize(torch.randn(config.embedding), dim=0)
            self.offset = nn.Parameter(8 * order * way)

    def forward(self, features: Features, architecture: int = 0) -> Tensor:
        z = 0 if self.offset is None else self.offset[architecture]
        if (h := features.prep) is not None:
            if self.chunk is not None:
                h = F.leaky_relu(self.chunk(h) + self.position[architecture])  # [N, T, d]
            z = z + self.gather[architecture](h.flatten(1))
        if (h := features.answers) is not None:
            z = z + self.answers(h if self.axes is None else (h - self.centre) @ self.axes)
        return z

    def read_along(self, answers: Tensor) -> None:
        """From now on read what sets the answers [N, M·K + 1] of a zoo apart.

        Their principal components, each divided by the root of its spread: as they are, training
        would take long to hear the narrow ones; all as wide as each other, they would be mostly
        noise. From a thousand nets on this pays; few nets span too little of what others answer.
        """
        known = answers.double().cpu().numpy()
        if known.std(0).max() < 1e-6:  # one net, or nets that answer alike
            return
        count = min(self.axes.shape[1], len(known))
        with ALONE, threadpool_limits(1):  # or axes, and so resuming, depend on how many there are
            pca = PCA(count, random_state=0).fit(known)
        spread = torch.from_numpy(pca.singular_values_)
        root = spread.clamp_min(1e-3 * spread[0]).sqrt()
        root *= (spread / root).square().mean().div(len(known)).sqrt()  # values of size 1
        self.centre.copy_(torch.from_numpy(pca.mean_))
        self.axes.zero_()[:, :count] = torch.from_numpy(pca.components_).T / root


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
        self.scale = nn.ParameterList([torch.full_like(b, _spread(b)) for b in bases])

    def forward(self, z: Tensor, architecture: int = 0) -> Tensor:
        h = F.leaky_relu(self.hidden(z))  # [N, hidden]
        rows = self.heads[architecture](h)  # [N, P]
        return torch.addcmul(self.bias[architecture], rows, self.scale[architecture])


class NetSpace(nn.Module):
    """An embedding space of one or several architectures.

    Args:
        modules: one module of each architecture; of a single one the module itself will do.
        inputs: [S, ...] typical inputs, floats or tokens; the probes start as M of them.
        config: sizes.
        seed: of the initialisation.

    Build it with `NetSpace.for_zoos`, which also measures the zoos' weight statistics.
    """

    @torch.inference_mode(False)
    def __init__(self, modules, inputs: Tensor, config: SpaceConfig | None = None, seed: int = 0):
        super().__init__()
        self.config, self.seed = config or SpaceConfig(), int(seed)
        config, answers = self.config, 0
        check_kind(SpaceConfig, "a config is a SpaceConfig, as SpaceConfig(embedding=64)", config)
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        if isinstance(kind, str) or not (kind.is_floating_point or kind in TOKENS):
            raise ValueError(f"inputs should be floats in a tensor, as data.train.x, not {kind}")
        if config.probes:
            check_finite(inputs, "inputs")
        if config.learn_probes and not inputs.is_floating_point():
            raise ValueError("probes that are tokens can't be learned: pass learn_probes=False")
        modules = listed(modules)
        reads = len(modules), config.weights, config.probes
        if config.parts == "paper" and reads != (1, True, 0):
            raise ValueError("the paper's parts read one architecture's weights: pass probes=0")
        self.batched = [Batched(fold_batchnorm(module)) for module in modules]
        if not self.batched or len({b.fingerprint for b in self.batched}) < len(self.batched):
            raise ValueError("no architectures, or two that compute the same: give each one once")
        bases = [b.layout.pack([b.module])[0] for b in self.batched]
        like = inputs if inputs.is_floating_point() else bases[0].to(inputs.device)
        shapes = [(b.layout.chunks(config.chunk), config.chunk) for b in self.batched]
        if config.weights == "invariants":
            shapes = [tuple(self._weights(base[None], a).shape) for a, base in enumerate(bases)]
        for a, shape in enumerate(shapes):
            self.register_buffer(f"mean{a}", torch.zeros(shape))
            self.register_buffer(f"std{a}", torch.ones(shape))
            self.register_buffer(f"constant{a}", None)
        with own_randomness(self.seed), torch.no_grad():
            if config.probes:
                probes = inputs[torch.randperm(len(inputs))[: config.probes]]
                self.probes = nn.Parameter(probes.clone(), requires_grad=config.learn_probes)
                pairs = zip(self.batched, bases, strict=True)
                found = (b(base[None].to(like), probes) for b, base in pairs)
                sizes = [normalised_answers(own, config.values).shape[1] for own in found]
                if len(set(sizes)) > 1:
                    raise ValueError(f"architectures give {sizes} outputs on the probes: not alike")
                answers = sizes[0]
            if config.parts == "paper":
                self.encoder = ConvEncoder(config.embedding)
                self.decoder = ConvDecoder(config.embedding, *shapes[0], bases[0])
            else:
                self.encoder = Encoder(config, shapes, answers)
                self.decoder = Decoder(config, bases)
            if len(self.batched) > 1:  # says which architecture z stands for
                self.classifier = nn.Linear(config.embedding, len(self.batched))
            if (offset := self.encoder.offset) is not None:  # the nearest, at first
                self.classifier.weight.copy_(offset / 4)
                self.classifier.bias.copy_(-offset.square().sum(1) / 8)
        self.to(like)

    @classmethod
    @torch.inference_mode(False)  # or buffers could never be loaded
    def for_zoos(
        cls, zoos, inputs: Tensor, config: SpaceConfig | None = None, seed: int = 0, modules=None
    ):
        """A space for these training zoos, one per architecture (or a single zoo).

        Weights are standardised by the zoo's mean and spread per position; the decoder's bias
        starts at the zoo's best net by ``val_accuracy``, or its first where there is no score.

        Args:
            modules: the architectures in order of size, where there are more than zoos: those
                without a zoo are *unseen* (paper section IV-D) and start at the module's own
                values. None: the architectures of the zoos.
        """
        zoos = [zoos] if isinstance(zoos, Nets | nn.Module | Tensor) else list(zoos)
        check_kind(Nets, "a space is built for zoos, as Zoo.from_modules(modules)", *zoos)
        space = cls([z.module for z in zoos] if modules is None else modules, inputs, config, seed)
        index = [space.index(zoo) for zoo in zoos]
        if len(set(index)) < len(zoos):
            raise ValueError("several zoos of one architecture: make them one, or leave some out")
        for a, zoo in zip(index, zoos, strict=True):
            check_finite(rows := zoo.rows.detach())
            scores = getattr(zoo, "scores", {}).get("val_accuracy", torch.zeros(len(zoo)))
            base = rows[scores.nan_to_num(-torch.inf).argmax()]
            same = (rows == base).all(0)  # such as frozen layers
            if same.any() and not same.all():  # of one net, or copies of it, there is no telling
                setattr(space, f"constant{a}", base.where(same, torch.nan))
            space.decoder.bias[a].data.copy_(base)
            space.decoder.scale[a].data.fill_(_spread(base))
            rows = space._weights(rows, a)
            size = rows.shape[1]
            getattr(space, f"mean{a}").flatten()[:size] = rows.mean(0)
            if len(zoo) > 1:
                spread = rows.std(0)  # what hardly differs in a zoo is not to be magnified
                spread = spread.where(spread > 1e-4 * spread.max(), 1.0)
                getattr(space, f"std{a}").flatten()[:size] = spread
        if space.config.components and space.config.probes:
            with torch.no_grad():
                answers = [space._answers(z.rows, a) for z, a in zip(zoos, index, strict=True)]
            space.encoder.read_along(torch.cat(answers))
        return space

    @property
    def architectures(self) -> list[str]:
        """Names of the architectures, in the order of their indices."""
        names = [name_of(b.module) for b in self.batched]
        repeats = [names[:a].count(name) for a, name in enumerate(names)]
        return [f"{n}-{k + 1}" if k else n for n, k in zip(names, repeats, strict=True)]

    def index(self, architecture=None) -> int:
        """The index of an architecture given by index, name, module or `Nets`.

        None stands for the only one. Modules and nets are recognised by what they compute, so that
        nets of ReLU and Tanh with the same layout are told apart. Raises ValueError saying which
        architectures there are.
        """
        names, wanted = self.architectures, architecture
        if isinstance(architecture, nn.Module):
            return self.index(Nets(*packed([architecture])))
        if isinstance(architecture, Nets):
            wanted = architecture.batched.fingerprint
        elif architecture is None and len(names) == 1:
            wanted = 0
        elif getattr(architecture, "ndim", None) == 0:  # a number of NumPy's, or of `predict`
            wanted = architecture.item()
        for a, (name, batched) in enumerate(zip(names, self.batched, strict=True)):
            if wanted in (name, batched.fingerprint) or (type(wanted) is int and wanted == a):
                return a
        what = f"architecture {architecture!r}"
        if isinstance(architecture, Nets):
            what = f"a {name_of(architecture.module)} of {architecture.layout.size:,} parameters"
            what += ", recognised by what it computes"
        known = (f"{n} ({b.layout.size:,})" for n, b in zip(names, self.batched, strict=True))
        raise ValueError(f"{what}, is not one of this space, which holds {', '.join(known)}")

    def _weights(self, rows: Tensor, architecture: int) -> Tensor:
        """What the encoder reads of weights [N, P], before it is standardised: [N, P] or [N, F]."""
        layout = self.batched[architecture].layout
        return invariants(layout, rows) if self.config.weights == "invariants" else rows

    def _answers(self, rows: Tensor, architecture: int) -> Tensor:
        """What nets [N, P] answer to the probes, as the encoder takes it: [N, M·K + 1]."""
        batched = self.batched[architecture]
        blocks = [batched(part, self.probes) for part in rows.split(2 * BLOCK)]
        return normalised_answers(torch.cat(blocks), self.config.values)

    def features(self, rows: Tensor, architecture: int = 0) -> Features:
        """What the encoder reads of packed nets: rows [N, P] -> Features.

        Raises ValueError naming nets that hold values that are not finite.
        """
        check_finite(rows)
        if rows.dtype != (own := self.decoder.bias[0].dtype):
            raise ValueError(f"nets are {rows.dtype}, the space is {own}: convert one with .to()")
        prep = None
        if self.config.weights:
            mean, std = (getattr(self, f"{part}{architecture}").float() for part in ("mean", "std"))
            prep = chunk_pack(self._weights(rows, architecture), *mean.shape, mean, std)
        return Features(prep, self._answers(rows, architecture) if self.config.probes else None)

    def encode(self, nets, architecture=None) -> Tensor:
        """Embeddings [N, E] of `Nets`, packed rows [N, P], modules, or state dicts.

        Without gradients: an objective encodes by ``MixedZoo(space, zoo).encode(space, n)``.
        `Nets` and modules are asked for their architecture, a list of `Nets` (a mixed zoo) is
        encoded one after the other; for rows and state dicts name it in a space of several.

        Raises ValueError if the nets are not of the architecture, or not finite.
        """
        if isinstance(nets, MixedNets):
            return nets.join([self.encode(group, architecture) for group in nets.groups])
        alone = isinstance(nets, dict | Tensor) or not isinstance(nets, Iterable)
        nets = listed([nets] if alone else nets)
        check_kind(nn.Module | dict | Nets | Tensor, "nets, rows or modules are encoded", *nets)
        if nets and all(isinstance(net, nn.Module) for net in nets):
            nets = [Nets(*packed(nets))]
        if len(nets) > 1 and isinstance(nets[0], Nets | Tensor):
            return torch.cat([self.encode(group, architecture) for group in nets])
        known = [net for net in nets if isinstance(net, Nets | nn.Module)]
        known += [architecture] if architecture is not None or not known else []
        if len(found := {self.index(one) for one in known}) > 1:
            raise ValueError("nets are not of the architecture given: encode each kind apart")
        (a,) = found
        if nets and isinstance(nets[0], Nets | Tensor):
            rows = getattr(nets[0], "rows", nets[0])
        else:
            check_kind(dict, "state dicts are encoded together, or modules", *nets)
            for state in nets:
                self.batched[a].check_constants(state)
            rows = self.batched[a].layout.pack(nets)
        check_rows(rows, self.batched[a].layout.size)
        with torch.no_grad():  # in parts: what is read of nets is several times their size
            parts = (self.features(part, a) for part in rows.split(4096))
            return torch.cat([self.encoder(part, a) for part in parts])

    def decode(self, z: Tensor, architecture=None) -> Nets | MixedNets:
        """Nets of an architecture (index or name) that embeddings z [N, E] (or [E]) stand for.

        Without a name, a space of several architectures predicts which one each embedding stands
        for and returns `MixedNets`. Parameters that are the same in all nets of a zoo stay so.

        Differentiable: gradients of anything the nets answer flow back to ``z``.
        """
        z = self.check(z)
        if architecture is None and len(self.batched) > 1:
            groups = [(self.decode(z[n], a), n) for a, n in members_of(self.predict(z))]
            return MixedNets(*zip(*groups, strict=True))
        a = self.index(architecture)
        rows, constant = self.decoder(z, a), getattr(self, f"constant{a}")
        rows = rows if constant is None else rows.where(constant.isnan(), constant)
        return Nets(self.batched[a], rows)

    def classify(self, z: Tensor) -> Tensor:
        """Logits [N, A] of the architecture that embeddings z [N, E] stand for.

        Raises ValueError in a space of one architecture, where there is nothing to tell apart.
        """
        if len(self.batched) == 1:
            raise ValueError(f"this space has one architecture only, {self.architectures[0]}")
        return self.classifier(self.check(z))

    def predict(self, z: Tensor) -> Tensor:
        """Index [N] of the architecture that embeddings z [N, E] stand for."""
        return self.classify(z).argmax(1)

    def translate(self, z: Tensor, source, target) -> Tensor:
        """Embeddings of ``source`` nets moved to another architecture: same answers, other form.

        They stay where they are in a space that isn't told architectures.
        """
        z, source, target = self.check(z), self.index(source), self.index(target)
        offset = self.encoder.offset
        return z if source == target or offset is None else z - offset[source] + offset[target]

    def check(self, z: Tensor) -> Tensor:
        """Embeddings [N, E], or one of them, [E] -> [N, E]; ValueError if z is neither."""
        if not isinstance(z, Tensor):
            raise ValueError(f"embeddings are a {type(z).__name__}: space.encode(nets) gives them")
        z, size = torch.atleast_2d(z), self.config.embedding
        if z.dim() != 2 or z.shape[1] != size or len(z) == 0 or not z.is_floating_point():
            given = f"{list(z.shape)} of {z.dtype}"
            raise ValueError(f"embeddings should be [N, {size}] of floats, not {given}")
        return z.to(self.decoder.bias[0].dtype)  # of autocast's, or of another precision

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for a in range(len(self.batched)):  # in a state if nets share some
            given, like = state_dict.get(f"{prefix}constant{a}"), getattr(self, f"mean{a}")
            setattr(self, f"constant{a}", None if given is None else given.to(like, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save(self, folder) -> None:
        """Write the space to ``folder`` (JSON and safetensors), atomically."""
        known = [{**describe(b.module), "fingerprint": b.fingerprint} for b in self.batched]
        record = {"config": asdict(self.config), "architectures": known, "seed": self.seed}
        store.save(folder, "space", record, self.state_dict())

    @classmethod
    def load(cls, folder, modules=None) -> "NetSpace":
        """Read a space back; ``modules`` are needed for architectures that aren't registered.

        Raises ValueError if ``modules`` compute something else than those of the space.
        """
        record, state = store.load(folder, "space")
        with store.reading(folder):
            known = record["architectures"]
            modules = [build(about) for about in known] if modules is None else modules
            config = SpaceConfig(**record["config"])
            like = state["decoder.bias.0"]
            space = cls(modules, state.get("probes", like), config, record["seed"]).to(like.dtype)
            if [b.fingerprint for b in space.batched] != [about["fingerprint"] for about in known]:
                names = ", ".join(about["name"] for about in known)
                raise ValueError(f"{folder} holds a space of {names}: other modules were given")
            space.load_state_dict(state)
        kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        if len(kinds) > 1:
            raise ValueError(f"{folder} holds a space of mixed dtypes {kinds}: save it again")
        return space


def _spread(row: Tensor) -> float:
    """Standard deviation of a net's values; 1 if it has only one, or the same everywhere."""
    return float(row.std(correction=int(len(row) > 1))) or 1.0


def _centred(outputs: Tensor, values: bool) -> Tensor:
    """Logits [N, B, K] without their mean over classes, which softmax ignores; values as they are.

    See `as_answers` for other shapes.
    """
    outputs = as_answers(outputs, values)
    alone = values or outputs.shape[-1] == 1
    return outputs if alone else outputs - outputs.mean(-1, keepdim=True)


def logit_scale(outputs: Tensor, values: bool = False) -> Tensor:
    """Root mean square of each net's centred logits [N, B, K]: [N, 1, 1], its natural temperature.

    Nets at the start of training have logits a hundred times smaller than trained ones; measured in
    their own scale, all nets weigh the same in the loss. 1 for nets whose answers say nothing: in a
    scale of nearly 0 they would weigh more than all others. ``values`` aren't centred.
    """
    # few at a time: a zoo's answers may be a gigabyte
    blocks = (_centred(own, values).square() for own in outputs.split(BLOCK))
    scale = torch.cat([own.mean((1, 2), keepdim=True).sqrt() for own in blocks])
    return scale.where(scale > 1e-6, 1.0)


def normalised_answers(outputs: Tensor, values: bool = False) -> Tensor:
    """Answers [N, M, K] -> [N, M·K + 1]: each net's own level and spread apart from its shape.

    Logits are centred, then divided by their spread, whose logarithm is kept as the last value.
    """
    flat = _centred(outputs, values).flatten(1)
    spread = flat.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
    return torch.cat([flat / spread, spread.log()], dim=1)
