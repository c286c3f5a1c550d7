"""BigGAN-deep and T2T-ViT as modules of PyTorch's, from their papers and the names of their weights: oracles for bench's."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import spectral_norm


class ConditionalNorm(nn.Module):
    """Statistics of one truncation; gain and offset by the condition, or learned where there is none."""

    def __init__(self, config, channels, *, conditional=True):
        super().__init__()
        self.eps, self.steps = config.eps, config.n_stats - 1
        self.register_buffer("running_means", torch.zeros(config.n_stats, channels))
        self.register_buffer("running_vars", torch.ones(config.n_stats, channels))
        if conditional:
            self.scale = spectral_norm(nn.Linear(config.condition, channels, bias=False))
            self.offset = spectral_norm(nn.Linear(config.condition, channels, bias=False))
        else:
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x, condition, truncation):
        row = round(truncation * self.steps)
        mean, variance = (table[row].view(1, -1, 1, 1) for table in (self.running_means, self.running_vars))
        x = (x - mean) * (variance + self.eps).rsqrt()
        if hasattr(self, "weight"):
            return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        gain, offset = (layer(condition)[..., None, None] for layer in (self.scale, self.offset))
        return x + x * gain + offset


class GeneratorBlock(nn.Module):
    def __init__(self, config, block):
        super().__init__()
        self.doubled, inside, outside = block
        inside, outside = inside * config.channel_width, outside * config.channel_width
        middle = inside // 4
        sizes = ((inside, middle, 1), (middle, middle, 3), (middle, middle, 3), (middle, outside, 1))
        for step, (before, after, side) in enumerate(sizes):
            self.add_module(f"bn_{step}", ConditionalNorm(config, before))
            self.add_module(f"conv_{step}", spectral_norm(nn.Conv2d(before, after, side, padding=side // 2)))

    def forward(self, x, condition, truncation):
        y = x
        for step in range(4):
            y = getattr(self, f"bn_{step}")(y, condition, truncation).relu()
            if self.doubled and step == 1:
                y = y.repeat_interleave(2, -1).repeat_interleave(2, -2)
            y = getattr(self, f"conv_{step}")(y)
        if y.shape[1] != x.shape[1]:
            # As published: half of the channels are left out.
            x = x.chunk(2, dim=1)[0]
        return y + (x.repeat_interleave(2, -1).repeat_interleave(2, -2) if self.doubled else x)


class ImageAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        outputs = {"theta": channels // 8, "phi": channels // 8, "g": channels // 2}
        for name, number in outputs.items():
            self.add_module(f"snconv1x1_{name}", spectral_norm(nn.Conv2d(channels, number, 1, bias=False)))
        self.snconv1x1_o_conv = spectral_norm(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x, condition, truncation):
        q = self.snconv1x1_theta(x)
        k, v = (functional.max_pool2d(layer(x), 2) for layer in (self.snconv1x1_phi, self.snconv1x1_g))
        weights = torch.einsum("bchw,bcij->bhwij", q, k).flatten(3).softmax(-1)
        out = torch.einsum("bhwn,bcn->bchw", weights, v.flatten(2))
        return x + self.gamma * self.snconv1x1_o_conv(out)


class GeneratorReference(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, place = config.channel_width, config.attention_layer_position
        layers = [GeneratorBlock(config, block) for block in config.layers]
        layers.insert(place, ImageAttention(config.layers[place][1] * width))
        self.embeddings = nn.Linear(config.num_classes, config.class_embed_dim, bias=False)
        self.generator = nn.Module()
        self.generator.gen_z = spectral_norm(nn.Linear(config.condition, 16 * 16 * width))
        self.generator.layers = nn.ModuleList(layers)
        self.generator.bn = ConditionalNorm(config, width, conditional=False)
        self.generator.conv_to_rgb = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.classes = config.num_classes

    def forward(self, noise, labels, truncation):
        one_hot = functional.one_hot(labels, self.classes).to(noise.dtype)
        condition = torch.cat([noise, self.embeddings(one_hot)], dim=1)
        x = self.generator.gen_z(condition).unflatten(1, (4, 4, -1)).movedim(-1, 1)
        for layer in self.generator.layers:
            x = layer(x, condition, truncation)
        x = self.generator.conv_to_rgb(self.generator.bn(x, condition, truncation).relu())
        return x[:, :3].tanh()


class SelfAttention(nn.Module):
    def __init__(self, inside, width, heads, scale):
        super().__init__()
        self.qkv, self.proj = nn.Linear(inside, 3 * width, bias=False), nn.Linear(width, width)
        self.heads, self.scale = heads, scale

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) * self.scale).softmax(-1)
        return v.flatten(2), self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class TransformerLayer(nn.Module):
    def __init__(self, inside, width, hidden, heads, scale):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(inside), nn.LayerNorm(width)
        self.attn = SelfAttention(inside, width, heads, scale)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x):
        v, y = self.attn(self.norm1(x))
        y = y + (x if x.shape == v.shape else v)
        return y + self.mlp(self.norm2(y))


class ClassifierReference(nn.Module):
    def __init__(self, config):
        super().__init__()
        inside, width, token = (147, 9 * config.token), config.width, config.token
        self.tokens_to_token = nn.Module()
        for number, size in enumerate(inside):
            layer = TransformerLayer(size, token, token, 1, size**-0.5)
            self.tokens_to_token.add_module(f"attention{number + 1}", layer)
        self.tokens_to_token.project = nn.Linear(9 * token, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (config.image // 16) ** 2 + 1, width), requires_grad=False)
        scale = (width // config.heads) ** -0.5
        self.blocks = nn.ModuleList(
            TransformerLayer(width, width, config.hidden, config.heads, scale) for _ in range(config.depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, config.classes)

    def forward(self, pixels):
        x = self.tokens_to_token.attention1(nn.Unfold(7, stride=4, padding=2)(pixels).mT)
        x = nn.Unfold(3, stride=2, padding=1)(x.mT.unflatten(-1, (round(x.shape[1] ** 0.5), -1)))
        x = self.tokens_to_token.attention2(x.mT)
        x = nn.Unfold(3, stride=2, padding=1)(x.mT.unflatten(-1, (round(x.shape[1] ** 0.5), -1)))
        x = self.tokens_to_token.project(x.mT)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
