"""The authors' own encoder and decoder, to hold ours against: ``SpaceConfig(parts="paper", ...)``.

Both see a PRep as a picture of T rows and L columns (section III-B; 4096 values, 8 × 10,000).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 64  # the decoder starts from embeddings as pictures of 64 × 64


class ConvEncoder(nn.Module):
    """PReps [N, T, L] -> embeddings [N, E], one architecture, weights only.

    Two convolutions along the columns, the largest value of each row; two along the rows, the
    largest of each channel. With E = 4096 there are 6.79 M parameters, as published.
    """

    offset = None

    def __init__(self, embedding: int):
        super().__init__()
        h = embedding // 32
        along, across = {"stride": (1, 2), "padding": (0, 1)}, {"padding": (1, 0)}
        self.columns = nn.Sequential(
            nn.Conv2d(1, h, (1, 3), **along), nn.LeakyReLU(),
            nn.Conv2d(h, 2 * h, (1, 3), **along), nn.LeakyReLU(),
        )  # fmt: skip
        self.rows = nn.Sequential(
            nn.Conv2d(2 * h, 4 * h, (3, 1), **across), nn.LeakyReLU(),
            nn.Conv2d(4 * h, embedding, (3, 1), **across), nn.LeakyReLU(),
        )  # fmt: skip

    def forward(self, features, architecture: int = 0) -> Tensor:
        per_row = self.columns(features.prep[:, None]).amax(3, keepdim=True)  # [N, 2h, T, 1]
        return self.rows(per_row).amax((2, 3))


class ConvDecoder(nn.Module):
    """Embeddings [N, E] -> rows [N, P]: four convolutions, reshaped to a PRep on the way.

    E is a multiple of 4096, L of 8; T is rounded up to a multiple of 4. For 8 × 10,000 there are
    2.9 M parameters, as published. A learned scale and bias per entry follow; as in `Decoder` the
    bias starts at ``base``, a trained net.
    """

    def __init__(self, embedding: int, chunks: int, length: int, base: Tensor):
        super().__init__()
        if embedding % SIDE**2 or length % 8:
            given = f"E = {embedding} and L = {length}"
            raise ValueError(f"the paper's decoder needs E in 4096s and L in eights, not {given}")
        self.t, self.length = -(-chunks // 4) * 4, length
        shrink = {"kernel_size": 3, "stride": 2, "padding": 1}
        self.convolutions = nn.ModuleList([
            nn.Conv2d(embedding // SIDE**2, 256 * self.t, **shrink),
            nn.Conv2d(128, length // 8, **shrink),
            nn.Conv2d(512, 256, **shrink),
            nn.Conv2d(256, 32, 3, padding=1),
        ])  # fmt: skip
        self.bias = nn.ParameterList([base.clone()])
        self.scale = nn.ParameterList([torch.full_like(base, float(base.std()))])

    def forward(self, z: Tensor, architecture: int = 0) -> Tensor:
        t, length = self.t, self.length
        shapes = (128, t, 2048), (512, t // 2, length // 4), (256, t // 4, length // 8)
        x = z.view(len(z), -1, SIDE, SIDE)
        for convolution, shape in zip(self.convolutions, shapes, strict=False):
            x = F.leaky_relu(convolution(x)).view(len(z), *shape)
        rows = self.convolutions[-1](x).flatten(1)[:, : len(self.bias[0])]
        return torch.addcmul(self.bias[0], rows, self.scale[0])
