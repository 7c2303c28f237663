"""What a space is trained for, and the loop that trains it.

An objective is a callable ``objective(space, generator) -> loss``: it draws nets and inputs with
the generator, encodes, decodes, and compares what the decoded nets answer with what they should.
"""

import time
from collections.abc import Callable
from math import cos, pi

import torch
from torch import Tensor, nn

from . import store
from .kernels import distillation_loss
from .progress import progress_bar
from .space import NetSpace


def spread(answers: Tensor) -> Tensor:
    """Root mean square of each net's centred logits [N, B, K]: [N, 1, 1], its natural temperature.

    Nets at the start of training have logits a hundred times smaller than trained ones; measured in
    their own spread, all nets weigh the same in the loss.
    """
    centred = answers - answers.mean(-1, keepdim=True)
    return centred.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)


def kl_divergence(outputs: Tensor, answers: Tensor, temperature) -> Tensor:
    """KL of softened predictions from softened targets, mean over samples: [N, B, K] -> [N].

    ``answers`` are [N, B, K], or [1, B, K] for all nets; ``temperature`` is a number or [N, 1, 1].
    """
    if isinstance(temperature, Tensor):
        temperature = temperature.flatten()
    answers = answers.expand_as(outputs)
    return distillation_loss(outputs, answers, temperature=temperature) / temperature**2


class InstanceDistillation:
    """Decoded nets answer like the very nets that were encoded (paper section III-C).

    Args:
        space: the space to be trained; its features of the zoo are computed once.
        zoo: the nets to learn from.
        inputs: [S, ...] shared, or [N, S, ...] with ``per_net``.
        loss: (outputs, answers, scale) -> [N]; ``kl_divergence`` for logits with the scale as
            temperature, or `netspace_lite.shape_nets.squared_error`.
        nets, samples: drawn in each step; many nets on few samples learn fastest.
    """

    def __init__(
        self, space, zoo, inputs, *, per_net=False, loss=kl_divergence, nets=48, samples=24,
        architecture=0,
    ):  # fmt: skip
        self.zoo, self.inputs, self.per_net, self.loss = zoo, inputs, per_net, loss
        self.nets, self.samples, self.architecture = nets, samples, architecture
        self.answers = zoo.outputs(inputs, per_net)
        self.scale = spread(self.answers) if self.answers.shape[-1] > 1 else None
        with torch.no_grad():
            self.features = space.features(zoo.rows, architecture)

    def __call__(self, space: NetSpace, generator: torch.Generator) -> Tensor:
        n = torch.randint(len(self.zoo), (self.nets,), generator=generator)
        s = torch.randint(self.answers.shape[1], (self.samples,), generator=generator)
        if space.config.learn_probes:
            features = space.features(self.zoo.rows[n], self.architecture)
        else:
            features = self.features[n]
        z = space.encoder(features, self.architecture)
        inputs = self.inputs[n[:, None], s] if self.per_net else self.inputs[s]
        outputs = space.decode(z, self.architecture)(inputs, self.per_net)
        scale = None if self.scale is None else self.scale[n]
        return self.loss(outputs, self.answers[n[:, None], s], scale).mean()


def refine(
    space: NetSpace, nets, inputs: Tensor, steps: int = 50, *, z: Tensor | None = None,
    per_net: bool = False, loss=kl_divergence, samples: int = 64, lr: float = 0.05,
    architecture: int = 0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Embeddings [N, E] polished until the decoded nets answer ``inputs`` more like ``nets``.

    The encoder's embeddings (or ``z``) are the start; the space stays as it is and Adam moves z
    alone, on the loss the space was trained with. What an encoder misses of a net it has never seen
    is won back in a few steps, as auto-decoders do (DeepSDF, Park et al. 2019, section 4).

    Args:
        nets: N `Nets` of the architecture.
        inputs: [S, ...] inputs whose answers are compared, ``samples`` of them a step; with
            ``per_net`` [N, S, ...], each net's own.
        loss: (outputs, answers, scale) -> [N], as in `InstanceDistillation`.
    """
    answers = nets.outputs(inputs, per_net)
    scale = spread(answers) if answers.shape[-1] > 1 else None
    z = (space.encode(nets, architecture) if z is None else z.detach().clone()).requires_grad_()
    adam = torch.optim.Adam([z], lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        s = torch.randint(answers.shape[1], (samples,), generator=generator)
        x = inputs[:, s] if per_net else inputs[s]
        outputs = space.decode(z, architecture)(x, per_net)
        (z.grad,) = torch.autograd.grad(loss(outputs, answers[:, s], scale).sum(), z)
        adam.step()
    return z.detach()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth of the steps, then half a cosine to zero."""
    warmup = max(1, steps // 20)
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + cos(pi * step / steps))


def fit(
    space: NetSpace,
    objective: Callable[[NetSpace, torch.Generator], Tensor],
    validate: Callable[[NetSpace], dict[str, float]],
    steps: int = 4000,
    *,
    lr: float = 2e-3,
    epoch: int = 250,
    seed: int = 0,
    folder=None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``space`` in place and leave it in its best state.

    After every ``epoch`` steps ``validate`` scores the space; the state with the highest *first*
    score is kept. With ``folder`` every epoch is saved there and the same call resumes, bit for
    bit; a finished fit is loaded.

    Returns the history: one dict of step, seconds, loss and the scores per epoch.
    """
    trained = [p for p in space.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr, fused=True)  # one pass over memory, not ten
    generator = torch.Generator().manual_seed(seed)
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    plan = {"steps": steps, "lr": lr, "epoch": epoch, "seed": seed}
    if folder is not None and store.exists(folder, "fit"):
        history, best = _resume(folder, plan, space, optimiser, generator)
    started = time.monotonic() - (history[-1]["seconds"] if history else 0.0)
    first, running = (int(history[-1]["step"]) if history else 0), 0.0
    with progress_bar(steps, "fitting the space", progress, first) as bar:
        for step in range(first, steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            loss = objective(space, generator)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(space.parameters(), 1.0)
            optimiser.step()
            running += loss.item()
            bar.update()
            if (step + 1) % epoch and step + 1 < steps:
                continue
            found = validate(space)
            score = next(iter(found))
            bar.set_postfix(loss=f"{running / epoch:.4f}", **{score: f"{found[score]:.2f}"})
            if not best or found[score] > max(row[score] for row in history):
                best = {k: v.detach().clone() for k, v in space.state_dict().items()}
            seconds = time.monotonic() - started
            history.append({"step": step + 1, "seconds": seconds, "loss": running / epoch, **found})
            running = 0.0
            if folder is not None:
                _checkpoint(folder, plan, space, optimiser, generator, history, best)
    space.load_state_dict(best)
    return history


def _checkpoint(folder, plan, space, optimiser, generator, history, best) -> None:
    tensors = {f"space.{k}": v for k, v in space.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in best.items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
    tensors["generator"] = generator.get_state()
    store.save(folder, "fit", {"plan": plan, "history": history}, tensors)


def _resume(folder, plan, space, optimiser, generator):
    record, tensors = store.load(folder, "fit")
    if record["plan"] != plan:
        raise ValueError(
            f"{folder} holds a fit with {record['plan']}, not {plan}: choose another folder, or "
            "delete it to start anew"
        )

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    space.load_state_dict(part("space."))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in part("adam.").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    generator.set_state(tensors["generator"])
    return record["history"], part("best.")
