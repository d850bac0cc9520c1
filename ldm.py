"""ldm.py: unconditional latent diffusion from scratch, in one file that reads like a lecture.

A diffusion model makes images out of noise by removing a little of the noise, many times. On
pixels, most of that work goes into details that hardly anybody sees. Latent diffusion (LDM,
Rombach et al. 2022, arXiv 2112.10752) therefore trains two networks, one after the other:

  stage 1   An autoencoder learns to turn an image x into a small latent z, and back.
  stage 2   A diffusion model learns to make new latents. Stage 1 turns them into images.

  python ldm.py demo                        # both stages on cartoon faces, on any laptop
  python ldm.py train-ae  --data celebhq    # stage 1
  python ldm.py train-ldm --data celebhq    # stage 2
  python ldm.py sample                      # new images from the newest run
  python ldm.py eval                        # how good the newest run is, in numbers

Read it from top to bottom: first the models, then their training, then what training needs.
   1 Blocks             6 UNet                             11 Sampling and evaluation
   2 Autoencoders       7 Latent diffusion, the samplers   12 Data
   3 LPIPS              8 Settings and optimisers          13 Runs: files, log, pictures
   4 PatchGAN           9 Stage 1: the autoencoder         14 Device and speed
   5 Noise scheduler   10 Stage 2: diffusion on latents    15 Command line

Shapes: B batch, C image channels, H W image size, D latent channels (z_channels in code), h w
latent size, K codebook size, N images, T diffusion steps. Inside a network, c is the number of
channels, and H W or h w the size of any map.
Names: x image in [-1, 1], z latent, z_e and z_q before and after quantising (section 2), z0
normalised and clean, z_t with the noise of step t = 0 .. T-1 (section 5), eps the noise.
"""
import argparse
import contextlib
import copy
import hashlib
import math
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torchvision import datasets, models, utils
from torchvision.transforms import functional as TF


# ---- 1. Blocks ---------------------------------------------------------------------------
# A few blocks build encoder, decoder and UNet. They are close to those of DDPM (Ho et al. 2020,
# arXiv 2006.11239, appendix B). Before training, a ResBlock or attention adds only a bias to
# its shortcut. So even a deep stack starts as hardly more than its shortcuts, and trains well.

def group_norm(c):
    # c is always a multiple of 4 here, and gcd(32, c // 4) groups divide it: 128 channels make
    # 32 groups of 4, and 192 make 16 groups of 12. The norm takes a group's mean away. In a
    # group of one channel, that would undo ResBlock's shift by t, so a group has at least 4.
    return nn.GroupNorm(math.gcd(32, c // 4), c)

class Attention(nn.Module):
    """Lets every position look at every other one: (B, c, h, w) -> the same shape.
    A convolution sees 3x3 neighbours. Attention is how the left eye learns of the right one. A
    query says what a position looks for, a key what it offers, and a value what it hands over.
    Each position gets the mean of all values, weighted by how well its query fits their keys.
    Heads do this side by side, each with its own part of queries, keys and values."""
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(c)
        self.qkv = nn.Linear(c, 3 * c)
        self.proj = nn.Linear(c, c)
        nn.init.zeros_(self.proj.weight)  # before training it adds only a bias

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)           # (B, h*w, c)
        qkv = self.qkv(tokens).unflatten(2, (3 * self.heads, -1))  # (B, h*w, 3*heads, c/heads)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)              # (B, heads, h*w, c/heads)
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(c/heads)) v
        out = self.proj(out.transpose(1, 2).flatten(2))            # (B, h*w, c)
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])

def norm_silu_conv(c_in, c_out):
    # The norm comes first, as in DDPM, so that what a shortcut carries is never normalised.
    return nn.Sequential(group_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))

class ResBlock(nn.Module):
    """Two convolutions and a shortcut around them: (B, c_in, H, W) -> (B, c_out, H, W).
    t_dim: the width of t_emb (B, t_dim), which tells a UNet of the noise step (section 6)."""
    def __init__(self, c_in, c_out, t_dim=None):
        super().__init__()
        self.conv1 = norm_silu_conv(c_in, c_out)
        self.conv2 = norm_silu_conv(c_out, c_out)
        self.time = nn.Linear(t_dim, c_out) if t_dim else None
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2[-1].weight)  # before training: the shortcut and a bias

    def forward(self, x, t_emb=None):
        y = self.conv1(x)                                          # (B, c_out, H, W)
        if self.time is not None:
            y = y + self.time(t_emb)[:, :, None, None]             # a shift per channel
        return self.shortcut(x) + self.conv2(y)

class Stack(nn.Sequential):
    """Layers in a row. Only ResBlocks are also given t_emb."""
    def forward(self, x, t_emb=None):
        for layer in self:
            x = layer(x, t_emb) if isinstance(layer, ResBlock) else layer(x)
        return x

def res_layers(c_in, c_out, n, t_dim, heads):
    """A list of n ResBlocks, each followed by attention if there are heads."""
    layers = []
    for i in range(n):
        layers.append(ResBlock(c_out if i else c_in, c_out, t_dim))
        if heads > 0:
            layers.append(Attention(c_out, heads))
    return layers

class DownBlock(Stack):
    """(B, c_in, H, W) -> (B, c_out, H/2, W/2), or with down=False (B, c_out, H, W)."""
    def __init__(self, c_in, c_out, layers, t_dim=None, heads=0, down=True):
        super().__init__(*res_layers(c_in, c_out, layers, t_dim, heads))
        if down:
            self.append(nn.Conv2d(c_out, c_out, 3, stride=2, padding=1))

class MidBlock(Stack):
    """(B, c_in, h, w) -> (B, c_out, h, w), with attention, cheap on maps this small."""
    def __init__(self, c_in, c_out, layers, t_dim=None, heads=4):
        super().__init__(*res_layers(c_in, c_out, layers, t_dim, heads))
        self.append(ResBlock(c_out, c_out, t_dim))

class UpBlock(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, 2h, 2w), or with up=False (B, c_out, h, w). In a UNet
    (section 6) there is also a skip, an earlier map of the output's size. Once x has that
    size, the c_skip channels join those of x, before the ResBlocks. No Stack could do that."""
    def __init__(self, c_in, c_out, layers, t_dim=None, heads=0, up=True, c_skip=0):
        super().__init__()
        self.smooth = nn.Conv2d(c_in, c_in, 3, padding=1) if up else None
        self.blocks = Stack(*res_layers(c_in + c_skip, c_out, layers, t_dim, heads))

    def forward(self, x, t_emb=None, skip=None):
        if self.smooth is not None:
            # Each pixel becomes 2x2, then a convolution smooths. nn.ConvTranspose2d would do
            # both in one, but with 3x3 weights it writes some pixels more often than others,
            # which can leave a checkerboard. nn.Upsample repeats, too, but once compiled
            # (section 14) its gradient is slow.
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = self.smooth(x)                                     # (B, c_in, 2h, 2w)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)                        # (B, c_in + c_skip, ...)
        return self.blocks(x, t_emb)


# ---- 2. Autoencoders ---------------------------------------------------------------------
# Stage 1 turns 256x256x3 numbers into 32x32x4. Why not a plain autoencoder? Its latents can
# be anywhere, and nothing says what the points between them decode to. Stage 2 never hits a
# latent exactly, so its errors might show. There are two remedies.
# VQVAE (van den Oord et al. 2017, arXiv 1711.00937) rounds: at each position the nearest of K
# learnt vectors, the codes, replaces the encoder's own, z_e. The decoder sees only codes, and a
# loss, the commitment, keeps z_e near them. Stage 2 makes z_e, and rounding it on the way to
# the decoder repairs small errors.
# VAE (Kingma & Welling 2013, arXiv 1312.6114) adds noise to the latent while it trains, so that
# neighbours have to mean similar images. The encoder gives each latent value a mean and a
# deviation, that of its noise. Tiny deviations or huge means would undo the noise, but the KL
# loss, which is least for N(0, 1), punishes both. Its weight decides how much noise is left:
# much of it blurs, and after hardly any (LDM's weight is 1e-6) the errors of stage 2 show.

def build_encoder(channels, widths, layers, c_out):
    """Image (B, C, H, W) -> (B, c_out, h, w). Each width after the first halves the sides. So
    H and W have to be multiples of 2 ** (len(widths) - 1). The shapes beside the code are those
    of 256x256 images and widths 64 64 128 256."""
    c = widths[-1]
    return nn.Sequential(
        nn.Conv2d(channels, widths[0], 3, padding=1),              # (B, 64, 256, 256)
        # (B, 64, 128, 128), (B, 128, 64, 64), (B, 256, 32, 32)
        *[DownBlock(a, b, layers) for a, b in zip(widths, widths[1:])],
        MidBlock(c, c, layers),                                    # (B, 256, 32, 32)
        norm_silu_conv(c, c_out),                                  # (B, c_out, 32, 32)
        # One convolution could do the work of the last two, but VQGAN (section 9) has both.
        nn.Conv2d(c_out, c_out, 1))

def build_decoder(channels, widths, layers, z_channels):
    """Latent (B, D, h, w) -> image (B, C, H, W): the encoder's steps backwards."""
    widths = widths[::-1]
    c = widths[0]
    return nn.Sequential(
        nn.Conv2d(z_channels, z_channels, 1),
        nn.Conv2d(z_channels, c, 3, padding=1),                    # (B, 256, 32, 32)
        MidBlock(c, c, layers),
        # (B, 128, 64, 64), (B, 64, 128, 128), (B, 64, 256, 256)
        *[UpBlock(a, b, layers) for a, b in zip(widths, widths[1:])],
        norm_silu_conv(widths[-1], channels))                      # not clamped to [-1, 1]

class VectorQuantizer(nn.Module):
    """Replaces each latent vector by the nearest of K learnt vectors, the codebook. Codes that
    nothing picks get no gradient and would mostly stay unused. So call restart before the
    first step, and again every hundred steps or so."""
    def __init__(self, codebook_size, z_channels):
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, z_channels)    # (K, D)
        self.register_buffer("usage", torch.zeros(codebook_size))  # picks since the last restart

    def quantise(self, z_e):
        """z_e (B, D, h, w) -> z_q (B, D, h, w), the codes e_k with the least |z_e - e_k|^2
        (VQVAE's Eq. 1 and 2), and their indices k (B, h, w). The distances are float32, because
        with 16 bits (section 14) many a vector would get a wrong code."""
        with torch.autocast(z_e.device.type, enabled=False):
            z = z_e.movedim(1, -1)                                     # (B, h, w, D)
            dist = torch.cdist(z.flatten(0, 2), self.codebook.weight)  # (B*h*w, K)
            indices = dist.argmin(dim=1).view(z.shape[:3])             # (B, h, w)
            return self.codebook(indices).movedim(-1, 1), indices

    def forward(self, z_e):
        """z_e (B, D, h, w) -> z_st for the decoder (see below), of the same shape, and two
        losses, the last two terms of VQVAE's Eq. 3, as means and without weights. They have the
        same value, but "codebook" moves the codes and "commit" moves z_e."""
        z_q, indices = self.quantise(z_e)
        self.usage.index_add_(0, indices.flatten(), z_e.new_ones(indices.numel()))
        losses = {"codebook": F.mse_loss(z_q, z_e.detach()),
                  "commit": F.mse_loss(z_e, z_q.detach())}
        # argmin has no gradient. The straight-through trick: z_st has the value of z_q, and
        # hands the decoder's gradient to z_e as if nothing had been replaced.
        z_st = z_e + (z_q - z_e).detach()
        return z_st, losses

    @torch.no_grad()
    def restart(self, z_e):
        """Moves all codes unused since the last call onto random vectors of z_e (B, D, h, w).
        On the first call that is every code, so the codebook starts where the data are."""
        z = z_e.movedim(1, -1).flatten(0, 2)                       # (B*h*w, D)
        new = z[torch.randint(len(z), (len(self.usage),), device=z.device)]
        new = new + 0.01 * z.std() * torch.randn_like(new)         # no two codes alike
        unused = self.usage == 0                                   # (K,)
        self.codebook.weight[unused] = new[unused]
        self.usage.zero_()

class VQVAE(nn.Module):
    """Autoencoder with a quantiser in the middle. Call quantizer.restart as said above."""
    def __init__(self, channels, widths, layers, z_channels, codebook_size):
        super().__init__()
        self.encoder = build_encoder(channels, widths, layers, z_channels)
        self.decoder = build_decoder(channels, widths, layers, z_channels)
        self.quantizer = VectorQuantizer(codebook_size, z_channels)

    def forward(self, x):
        """x (B, C, H, W) in [-1, 1] -> reconstruction, {"codebook": loss, "commit": loss}."""
        z_st, losses = self.quantizer(self.encode(x))
        return self.decoder(z_st).float(), losses

    def encode(self, x):
        """x (B, C, H, W) -> the continuous z_e (B, D, h, w), which is what stage 2 models."""
        return self.encoder(x).float()  # it may have 16 bits (section 14)

    def decode(self, z):
        """z (B, D, h, w) -> image (B, C, H, W). Quantising z rounds small errors away."""
        z_q, _ = self.quantizer.quantise(z)
        return self.decoder(z_q).float()

class VAE(nn.Module):
    """Autoencoder whose encoder answers with a Gaussian for each latent value. The KL loss
    pulls each of them towards N(0, 1)."""
    def __init__(self, channels, widths, layers, z_channels):
        super().__init__()
        self.encoder = build_encoder(channels, widths, layers, 2 * z_channels)
        self.decoder = build_decoder(channels, widths, layers, z_channels)
        # The second half of the encoder's output is logvar, the log of the variance. It starts
        # near -6, a deviation of 0.05. A bias of 0, so a deviation of 1, would drown the image
        # for thousands of steps.
        nn.init.constant_(self.encoder[-1].bias[z_channels:], -6.0)

    def forward(self, x):
        """x (B, C, H, W) in [-1, 1] -> reconstruction, {"kl": KL(q || N(0, 1))}, where q is the
        Gaussian of z: kl is -1/2 sum(1 + logvar - mean^2 - exp(logvar)) (VAE, appendix B),
        divided by the number of image values, because the pixel loss is divided by it, too."""
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)     # each (B, D, h, w)
        logvar = logvar.clamp(-30, 20)                             # exp and logvar stay finite
        # Drawing has no gradient, but mean + std * eps has, in mean and std (VAE, Eq. 10).
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum() / x.numel()
        return self.decoder(z).float(), {"kl": kl}

    def encode(self, x):
        """x (B, C, H, W) -> the mean of q, (B, D, h, w). Noise is for training only."""
        return self.encoder(x).float().chunk(2, dim=1)[0]

    def decode(self, z):
        """z (B, D, h, w) -> image (B, C, H, W)."""
        return self.decoder(z).float()


# ---- 3. LPIPS ----------------------------------------------------------------------------
# A latent cannot hold every hair. Where it leaves a detail undecided, the answer with the least
# squared error is the mean of all that fit, and with the least absolute error their median.
# Both are a blur. LPIPS (Zhang et al. 2018, arXiv 1801.03924) compares images by what a trained
# classifier sees in them. In these features a blur is far from every photo, so that a sharp
# answer costs the decoder less than a blur.

class LPIPS(nn.Module):
    """Distance of two images as people see it, by the classifier VGG16: the same figure as from
    the `lpips` package with net="vgg", v0.1. Nothing is trained. weights: a file that says
    for each of five layers how much each channel counts for people, the w^2 (1, c, 1, 1) of
    forward. vgg: a dict with the `features.*` weights of VGG16; None downloads torchvision's
    528 MB once. Raises FileNotFoundError if one of the two is missing, damaged or cannot be
    downloaded."""
    def __init__(self, weights="lpips_weights.pth", vgg=None):
        super().__init__()
        net = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=False)  # VGG16
        try:
            lins = torch.load(weights, map_location="cpu", weights_only=True)
            self.lins = nn.ParameterList(lins[f"lin{i}.model.1.weight"] for i in range(5))
            vgg = vgg or models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(weights_only=True)
            net.load_state_dict({name.removeprefix("features."): w for name, w in vgg.items()
                                 if name.startswith("features.")})
        except Exception as error:
            path = Path(torch.hub.get_dir(), "checkpoints", "vgg16-397923af.pth")
            raise FileNotFoundError(
                f"LPIPS needs {weights}, which comes with ldm.py, and {path}, which is downloaded. "
                f"One is missing or damaged, or the download failed ({type(error).__name__}). "
                "Get the first again, or delete the second and go online. train-ae can do without "
                "both: --perceptual-weight 0") from error
        cuts = (0, 4, 9, 16, 23, 30)  # each slice ends with the ReLU before a pooling
        self.slices = nn.ModuleList(net[a:b] for a, b in zip(cuts, cuts[1:]))
        # These are ImageNet's mean and deviation per channel, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, x):
        """x (B, 1 or 3, H, W) in [-1, 1], at least 16x16 -> a list of five feature maps."""
        h = (x - self.shift) / self.scale  # by broadcasting, grey becomes three channels
        maps = []
        for part in self.slices:
            h = part(h)  # c = 64, 128, 256, 512, 512; sides H, H/2, H/4, H/8, H/16
            maps.append(h.float())  # their squares would overflow fp16
        return maps

    def forward(self, x, y):
        """x, y (B, 1 or 3, H, W) -> distances (B,), Eq. 1: the sum over layers of
        mean_hw sum_c w^2 (f_x / |f_x| - f_y / |f_y|)^2. No gradient goes into y."""
        total = 0
        for lin, f_x, f_y in zip(self.lins, self.features(x), self.features(y.detach())):
            diff = F.normalize(f_x, dim=1) - F.normalize(f_y, dim=1)  # (B, c, h, w)
            total = total + (lin * diff.square()).sum(dim=1).mean(dim=(1, 2))
        return total


# ---- 4. PatchGAN -------------------------------------------------------------------------
# LPIPS alone still leaves skin too smooth. So a second network, the discriminator, learns to
# tell photos from reconstructions, and the autoencoder, as generator, learns to fool it: a GAN.
# It judges patches and not whole images (Isola et al. 2017, arXiv 1611.07004), because texture
# is what is missing.

class PatchGAN(nn.Module):
    """Images (B, C, H, W), at least 8x8 -> scores (B, 1, h', w') of patches; high is real."""
    def __init__(self, channels=3, c=64):
        super().__init__()
        self.net = nn.Sequential(  # kernel 4, stride 2, padding 1 halves H and W
            nn.Conv2d(channels, c, 4, 2, 1), nn.LeakyReLU(0.2),  # no norm here, says the paper
            nn.Conv2d(c, 2 * c, 4, 2, 1), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * c, 4 * c, 4, 2, 1), nn.BatchNorm2d(4 * c), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * c, 1, 4, 1, 2))  # h' = H // 8 + 1; a score sees 46x46 (paper: 70x70)
        for layer in self.net:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)  # as in the paper

    def forward(self, x):
        return self.net(x).float()

def generator_loss(kind, fake):
    """What the autoencoder minimises, from the scores `fake` (any shape) of its images. hinge:
    -mean fake; lsgan: mean (fake - 1)^2; bce: -mean log p(fake) with p = sigmoid(score), the
    probability of being real. Raises KeyError for another kind."""
    return {"hinge": -fake.mean(),
            "lsgan": (fake - 1).square().mean(),
            "bce": F.softplus(-fake).mean()}[kind]  # softplus(-score) = -log p

def discriminator_loss(kind, real, fake):
    """What the discriminator minimises, from scores of photos and of reconstructions. hinge:
    mean max(0, 1 - real) + mean max(0, 1 + fake), where real > 1 and fake < -1 cost nothing;
    lsgan: mean (real - 1)^2 + mean fake^2; bce: -mean log p(real) - mean log(1 - p(fake));
    each halved, as in Isola et al."""
    return {"hinge": F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
            "lsgan": (real - 1).square().mean() + fake.square().mean(),
            "bce": F.softplus(-real).mean() + F.softplus(fake).mean()}[kind] / 2


# ---- 5. Noise scheduler ------------------------------------------------------------------
# Gaussian noise eps goes in by one formula: z_t = alpha z0 + sigma eps. As t rises, alpha falls
# and sigma rises, from nearly clean (t = 0) to nearly pure noise (t = T-1). A network is shown
# z_t and t, and predicts eps, or a mixture of eps and z0 called v. Either gives a guess of
# z0. Training with a squared error makes this guess a mean of all z0, in which those that fit
# z_t better count more. At t = T-1 all fit alike, and their mean is a blur. So a sampler
# mixes this guess again with noise, slightly less than before, and asks again. This noise is
# the eps that follows from the answer, or partly new. By chance the mixture fits some images a
# little better, and the next guess leans towards them. As the noise falls, fewer and fewer fit,
# and their mean gets sharper, until one is left. Which one is decided by the noise alone.
# Papers: DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song et al. 2020, 2010.02502),
# DPM-Solver++ (Lu et al. 2022, 2211.01095).

class NoiseScheduler(nn.Module):
    """How much noise there is at each step, and how to go from one step to another.
    Steps t = 0 .. T-1 are the papers' 1 .. T. alpha and sigma have one entry more at the end,
    1 and 0, for a clean latent. We call it step t = -1, as Python's [-1] is the last entry.
    Since alpha^2 + sigma^2 = 1 and z0 has variance 1 (section 7), z_t always has variance 1.
    target: what the network predicts, "eps" or "v" = alpha eps - sigma z0 (Salimans & Ho 2022,
    arXiv 2202.00512). At t = T-1 z_t is almost eps, so predicting eps teaches little there, and
    z0 follows from it only by a division by alpha = 0.012. v is almost -z0 at that end."""
    def __init__(self, T=1000, target="v"):
        super().__init__()
        if target not in ("eps", "v"):
            raise ValueError(f"no target {target!r}; choose eps or v")
        self.T = T
        self.target = target

        # In DDPM noise comes in step by step. Each step has a small number beta: it leaves
        # 1 - beta of the variance and adds beta. So of z0's variance a share abar is left, the
        # product of all 1 - beta so far. Our alpha is its root, while DDPM's alpha is 1 - beta.
        # As in LDM for faces, the roots of the betas rise evenly. They make alpha 0.999 at t =
        # 0, 0.91 at 100, 0.34 at 500, and 0.012 at 999.
        beta = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - beta, dim=0).tolist() + [1.0]     # T + 1 numbers
        self.alpha = [math.sqrt(a) for a in abar]
        self.sigma = [math.sqrt(1 - a) for a in abar]

        # The table holds the same numbers on the device, for a batch of different steps.
        self.register_buffer("table", torch.tensor([self.alpha, self.sigma]), persistent=False)

    def add_noise(self, z0, eps, t):
        """z0, eps (B, D, h, w), steps t (B,) -> z_t = alpha z0 + sigma eps, with the alpha and
        sigma of each image's own step: any amount of noise in one go (DDPM Eq. 4)."""
        alpha, sigma = self.table[:, t, None, None, None]          # each (B, 1, 1, 1)
        return alpha * z0 + sigma * eps

    def target_of(self, z0, eps, t):
        """What the network should answer to the z_t of add_noise, (B, D, h, w)."""
        alpha, sigma = self.table[:, t, None, None, None]
        return eps if self.target == "eps" else alpha * eps - sigma * z0

    def step_weights(self):
        """How often each step is drawn in training, (T,): evenly for eps, as in DDPM, but in
        proportion to alpha for v. In hundreds of steps there is so much noise that v is mostly
        guesswork. Drawn as often as others, they would swamp the gradient. On average,
        drawing a step half as often does the same as halving its loss. That alpha is a good
        weight was found by trying."""
        alpha = self.table[0, :-1]  # without the entry for a clean latent
        return alpha if self.target == "v" else torch.ones_like(alpha)

    def z0_and_eps(self, pred, z_t, t):
        """Turns pred, the network's answer to z_t at step t (an int), into estimates of z0 and
        eps. They solve z_t = alpha z0 + sigma eps and pred = eps, or pred = v = alpha eps -
        sigma z0. DDPM clamps z0 to the range of images, but latents have none."""
        alpha, sigma = self.alpha[t], self.sigma[t]
        if self.target == "eps":
            eps = pred
            z0 = (z_t - sigma * eps) / alpha  # at t = T-1, alpha = 0.012 blows up any error
        else:  # alpha z_t - sigma v = (alpha^2 + sigma^2) z0 = z0, and likewise for eps
            z0 = alpha * z_t - sigma * pred
            eps = sigma * z_t + alpha * pred
        return z0, eps

    def timesteps(self, steps):
        """[(t, t_next), ...], evenly from T-1 to -1. 30 steps: (999, 966) .. (32, -1)."""
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} denoising steps: give 1 to {self.T}")
        t = np.linspace(self.T - 1, -1, steps + 1).round().astype(int).tolist()
        return list(zip(t, t[1:]))

    def ddpm_step(self, z0, z_t, t, t_next, noise):
        """Draws z at t_next, which is Gaussian if z0 and z_t are known (DDPM Eq. 6 and 7). Its
        mean mixes the two and has less noise than z is to have at t_next. New noise makes up
        for the rest. But z0 is not known. Many fit, and each would give another Gaussian.
        The network tells only the mean z0, so the result varies too little, the more so the
        longer a step. All samplers suffer from that, this one most. So it needs many steps."""
        # Two things are known of z, the one at t_next. From z0: it is near alpha[t_next] z0,
        # with variance sigma[t_next]^2. From z_t = sqrt(a) z + noise of variance beta: it is
        # near z_t / sqrt(a), with variance beta / a. By Bayes' rule its mean weights these two
        # by 1 / variance, over the sum of both. With beta + a sigma[t_next]^2 = sigma[t]^2 that
        # gives the weights and std below.
        a = (self.alpha[t] / self.alpha[t_next]) ** 2  # what DDPM calls alpha_t, if t_next = t - 1
        beta = 1 - a  # here for the whole way from t_next to t
        z0_weight = self.alpha[t_next] * beta / self.sigma[t] ** 2
        z_t_weight = math.sqrt(a) * self.sigma[t_next] ** 2 / self.sigma[t] ** 2
        std = math.sqrt(beta) * self.sigma[t_next] / self.sigma[t]  # 0 in the last step
        return z0_weight * z0 + z_t_weight * z_t + std * noise

    def ddim_step(self, z0, eps, t_next):
        """Mixes the estimates again, with the alpha and sigma of t_next, so with less noise:
        DDIM Eq. 12 without its noise term."""
        return self.alpha[t_next] * z0 + self.sigma[t_next] * eps

    def dpm_step(self, z0, z_t, t, t_next, previous=None):
        """DPM-Solver++(2M), Algorithm 2. DDIM keeps one z0 for a whole step. If the network
        were asked again on the way, its z0 would drift, about evenly in lambda = log(alpha /
        sigma), the log of signal over noise. So this draws a line through the last two
        estimates, extends it over the step, and takes its value half-way. previous: (t, z0) of
        the step before, as the network gave it."""
        if previous is not None and t_next >= 0:  # at t = -1 lambda is infinite: plain DDIM
            steps = (previous[0], t, t_next)
            lam_before, lam, lam_next = (math.log(self.alpha[i] / self.sigma[i]) for i in steps)
            slope = (z0 - previous[1]) / (lam - lam_before)
            z0 = z0 + slope * (lam_next - lam) / 2
        eps = (z_t - self.alpha[t] * z0) / self.sigma[t]  # the noise that fits this z0
        return self.ddim_step(z0, eps, t_next)


# ---- 6. UNet -----------------------------------------------------------------------------
# The UNet makes the prediction. On its way down the maps get smaller, so that more channels
# cost little. On its way up, skips give back the detail that small maps cannot hold. It has to
# know t, for at t = 999 it can only say how an average face is laid out, and at t = 10 it
# polishes one. So t goes into every ResBlock. DDPM's UNet has a skip for each layer, and
# attention at 16x16. This one has a skip for each block, and attention on all maps.

def sinusoids(t, dim):
    """Steps t (B,) -> (B, dim): sin(f_i t), then cos(f_i t), with f_i = 10000^(-2 i / dim), i =
    0 .. dim / 2 - 1. Fast and slow waves tell steps apart, as clock hands tell the time."""
    freqs = 10000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs                            # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)

class UNet(nn.Module):
    """z_t (B, D, h, w), t (B,) -> prediction (B, D, h, w).
    Of its len(widths) - 1 down blocks the first `downs` halve h and w. build_ldm (section 10)
    takes as many as keep both whole and at least 4. What goes into a down block is also the
    skip for the up block beside it. Below is the celebhq default, channels and side: widths 192
    256 384 512, downs 3, h = w = 32. The data go down on the left and then up on the right.
      down  192 -> 256, 32 -> 16      up  192 + skip 192 -> 192, 16 -> 32
            256 -> 384, 16 -> 8           256 + skip 256 -> 192,  8 -> 16
            384 -> 512,  8 -> 4           384 + skip 384 -> 256,  4 -> 8
                         mid  512 -> 384
    The way up is narrower than the way down: that is cheaper, and was no worse when tried."""
    def __init__(self, z_channels, widths, downs, layers):
        super().__init__()
        c = widths[0]
        t_dim = 4 * c  # as in DDPM's code
        self.time = nn.Sequential(
            nn.Linear(c, t_dim), nn.SiLU(), nn.Linear(t_dim, t_dim), nn.SiLU())

        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = MidBlock(widths[-1], widths[-2], layers, t_dim)
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for i in range(len(widths) - 1):
            args = dict(layers=layers, t_dim=t_dim, heads=4)
            c_in, c_out, halve = widths[i], widths[i + 1], i < downs
            self.down_blocks.append(DownBlock(c_in, c_out, **args, down=halve))
            # Beside down block i, the up block gets widths[i] channels from below and as many
            # from the skip. It makes widths[i - 1], as 384 + 384 -> 256 for i = 2, and the last
            # one, whose i is 0, makes widths[0].
            up = UpBlock(c_in, widths[max(i - 1, 0)], **args, up=halve, c_skip=c_in)
            self.up_blocks.insert(0, up)  # the way up begins with the innermost

        self.out = norm_silu_conv(c, z_channels)
        nn.init.zeros_(self.out[-1].weight)  # so its first answers are near 0

    def forward(self, z_t, t):
        x = self.conv_in(z_t)                                      # (B, 192, 32, 32)
        t_emb = self.time(sinusoids(t, x.shape[1]))                # (B, t_dim)
        skips = []
        for block in self.down_blocks:
            skips.append(x)
            x = block(x, t_emb)     # (B, 256, 16, 16), (B, 384, 8, 8), (B, 512, 4, 4)
        x = self.mid(x, t_emb)                                     # (B, 384, 4, 4)
        for block in self.up_blocks:
            x = block(x, t_emb, skips.pop())  # (B, 256, 8, 8), (B, 192, 16, 16), (B, 192, 32, 32)
        return self.out(x).float()                                 # (B, D, h, w)


# ---- 7. Latent diffusion -----------------------------------------------------------------
# Everything that new images need is kept here: an autoencoder, a scheduler, the mean and
# deviation of the latents, and two UNets. Both are running averages of a third, the one that is
# trained. The late average is mostly over the last steps, and jitters less than the third.
# The early average was stopped after a fifth of the training. With the same data and the same
# layers it mostly errs in the same directions, only further. So the difference of the answers,
# late minus early, leads away from these errors, and late plus half of it is better still:
# autoguidance (Karras et al. 2024, arXiv 2406.02507).

class LatentDiffusion(nn.Module):
    """A diffusion model for the latents of a VQVAE or VAE, with z_shape = (D, h, w). Both
    averages, ema_unet (an exponential moving average) and early_unet, start as copies of unet.
    Train another copy (section 10), and let update_ema (section 8) move both towards it, the
    early one only at first."""
    def __init__(self, ae, unet, scheduler, z_shape):
        super().__init__()
        self.ae = ae
        self.ema_unet = copy.deepcopy(unet)
        self.early_unet = copy.deepcopy(unet)
        self.scheduler = scheduler
        self.z_shape = z_shape
        self.register_buffer("mean", torch.zeros(1, z_shape[0], 1, 1))
        self.register_buffer("std", torch.ones(1, z_shape[0], 1, 1))

    def measure(self, z):
        """Sets mean and std, per channel, from latents z (N, D, h, w). The schedule is made for
        variance 1. Latents that vary much more would still show through at t = T-1, and those
        that vary less would drown early (LDM, appendix G)."""
        self.std, self.mean = torch.std_mean(z.float(), (0, 2, 3), keepdim=True)
        self.std.clamp_(min=1e-6)  # a channel may be constant

    def normalise(self, z):
        """Latents z (B, D, h, w) of the autoencoder -> z0, as the UNet knows them."""
        return (z.float() - self.mean) / self.std

    def decode(self, z0):
        """The way back: z0 (B, D, h, w) -> images (B, C, H, W) in [-1, 1]."""
        return self.ae.decode(z0 * self.std + self.mean).clamp(-1, 1)

    def denoise(self, z_t, t, autoguidance=1.5):
        """z_t (B, D, h, w) at step t (an int) -> estimates of z0 and eps, of the same shape.
        With an autoguidance of 1, early_unet is not asked, and this takes half the time. 1.5
        adds half of the difference between the two answers."""
        t_batch = torch.full((len(z_t),), t, device=z_t.device)
        pred = self.ema_unet(z_t, t_batch)
        if autoguidance != 1:
            early = self.early_unet(z_t, t_batch)
            pred = early + autoguidance * (pred - early)
        return self.scheduler.z0_and_eps(pred, z_t, t)

    # Three samplers. Each goes from z_t to the z of t_next, and also returns its estimate of
    # z0. All take the same arguments, though none needs all. generators: a source of noise per
    # image. previous: (t, z0) of the step before.

    def ddpm(self, z_t, t, t_next, autoguidance, generators, previous):
        z0, _ = self.denoise(z_t, t, autoguidance)
        return self.scheduler.ddpm_step(z0, z_t, t, t_next, self.draw_noise(generators)), z0

    def ddim(self, z_t, t, t_next, autoguidance, generators, previous):
        z0, eps = self.denoise(z_t, t, autoguidance)
        return self.scheduler.ddim_step(z0, eps, t_next), z0

    def dpm(self, z_t, t, t_next, autoguidance, generators, previous):
        z0, _ = self.denoise(z_t, t, autoguidance)
        return self.scheduler.dpm_step(z0, z_t, t, t_next, previous), z0

    # Functions in a dict do not know their object, so `sample` passes self.
    SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm": dpm}

    def draw_noise(self, generators):
        """Noise (B, D, h, w): each generator draws that of one latent. They are on the CPU, so
        that a seed starts from the same noise on every device."""
        noise = [torch.randn(self.z_shape, generator=g) for g in generators]
        return torch.stack(noise).to(self.mean.device)

    @torch.no_grad()
    def sample(self, n, seed=0, sampler="dpm", steps=30, batch=64, dtype=None, autoguidance=1.5,
               trace=None, progress=lambda items, label: items):
        """Makes n images (n, C, H, W) in [-1, 1], returned on the CPU, `batch` at a time. Image
        i starts from noise that depends on the seed and i alone, so it looks the same in any
        batch. dtype is what autocast uses, and None means float32. trace is a list that gets
        (z_t, estimate of z0) of the first four images at each step. progress wraps a loop and
        says how far it is; the default says nothing. Raises ValueError for an unknown sampler,
        or for steps outside 1 to T."""
        if sampler not in self.SAMPLERS:
            raise ValueError(f"no sampler {sampler!r}; choose {', '.join(self.SAMPLERS)}")
        images = []
        for first in progress(range(0, n, batch), "sampling, batch"):
            # Seeds are a million numbers apart, so that no two of them share an image.
            generators = [torch.Generator().manual_seed(seed * 1_000_003 + i)
                          for i in range(first, min(first + batch, n))]
            z_t = self.draw_noise(generators)
            previous = None
            with torch.autocast(z_t.device.type, dtype, enabled=dtype is not None):
                for t, t_next in progress(self.scheduler.timesteps(steps), "denoising, step"):
                    z_next, z0 = self.SAMPLERS[sampler](self, z_t, t, t_next, autoguidance,
                                                        generators, previous)
                    if trace is not None and first == 0:
                        trace.append((z_t[:4].clone(), z0[:4].clone()))
                    previous = (t, z0)
                    z_t = z_next
                images.append(self.decode(z_t).cpu())
        return torch.cat(images)


# ---- 8. Settings and optimisers ----------------------------------------------------------
# Here the lecture turns from models to training. A dataclass holds the settings of a command,
# and those made by `flag` are also flags of the command line. The defaults, except data, are
# for 256x256 photos. Beside them stands what is different for the two small data sets.

def flag(default, text, *choices, low=1, high=10 ** 9, group=None, **presets):
    """A setting: its default, help text, choices if any (False, True for a switch), low and
    high for numbers. group is a heading that --help prints above this flag, and presets are
    {data set: another default}."""
    rule = dict(text=text, choices=choices, low=low, high=high, group=group, presets=presets)
    return field(default=default, metadata=rule)

@dataclass
class RunConfig:
    data: str = flag("toyfaces", "toyfaces, mnist, celebhq, or a folder", group="data and run")
    data_root: str = flag("data", "folder that holds the data sets")
    out: str = flag(None, "run folder; if not given, runs/ and the name of the data")
    seed: int = flag(0, "seed of the noise; in training also of weights and batches", low=0)
    amp: str = flag("auto", "mixed precision; auto: yes on CUDA", "auto", "bf16", "fp16", "off")

@dataclass
class TrainConfig(RunConfig):
    save_every: int = flag(1000, "steps between saves; fewer saves if they are slow")
    flip: bool = flag(True, "also train on mirrored images", False, True, mnist=False)
    compile: bool = flag(True, "torch.compile on CUDA: slow to start, then faster", False, True,
                         toyfaces=False, mnist=False)
    accum: int = flag(1, "batches per step; if memory is short, double this and halve --batch",
                      group="optimisation")

@dataclass
class AEConfig(TrainConfig):
    batch: int = flag(16, "images at once on the device", high=10 ** 5, toyfaces=8, mnist=128)
    steps: int = flag(6000, "optimiser steps in all", toyfaces=1200, mnist=1000)
    lr: float = flag(5e-4, "highest learning rate", low=1e-9, toyfaces=3e-3)
    ae: str = flag("vq", "autoencoder; vq: VQVAE, kl: VAE", "vq", "kl", group="model")
    size: int = flag(256, "side of the images in pixels", low=16, high=4096, toyfaces=32, mnist=28)
    channels: int = flag(3, "image channels; 3: colour, 1: grey", 1, 3, mnist=1)
    widths: tuple = flag((64, 64, 128, 256), "channels at each size; sizes halve in between",
                         toyfaces=(16, 32, 32), mnist=(32, 64, 64))
    layers: int = flag(2, "ResBlocks per block", high=20, toyfaces=1)
    z_channels: int = flag(4, "latent channels", toyfaces=3, mnist=3)
    codebook_size: int = flag(16384, "vectors in the codebook (vq)", toyfaces=512, mnist=256)
    # Toy faces use l2. The best answer to l1 is the median colour, and where lips are thin the
    # median is skin.
    recon: str = flag("l1", "reconstruction loss", "l1", "l2", group="losses", toyfaces="l2")
    codebook_weight: float = flag(1.0, "weight of the codebook loss (vq)", low=0)
    commit_weight: float = flag(0.25, "weight of the commitment loss (vq)", low=0)
    # With these weights a latent of the VAE holds about as many bits as one of the VQVAE.
    kl_weight: float = flag(0.4, "weight of the KL term (kl)", low=0, toyfaces=0.03, mnist=0.03)
    perceptual_weight: float = flag(1.0, "weight of LPIPS; 0: off", low=0, toyfaces=0.0, mnist=0.0)
    gan_weight: float = flag(0.05, "highest weight of GAN; 0: off", low=0, toyfaces=0.0, mnist=0.0)
    gan: str = flag("hinge", "kind of GAN loss", "bce", "lsgan", "hinge")
    disc_start: int = flag(None, "steps without GAN; if not given, a quarter of all", low=0)
    pictures: str = ""  # no flag: the name that load_images gives the pictures

@dataclass
class LDMConfig(TrainConfig):
    batch: int = flag(128, "latents at once on the device", high=10 ** 5, toyfaces=64, mnist=512)
    steps: int = flag(10000, "optimiser steps in all", toyfaces=500, mnist=2000)
    lr: float = flag(4e-4, "highest learning rate", low=1e-9, toyfaces=3e-3, mnist=1e-3)
    widths: tuple = flag((192, 256, 384, 512), "UNet channels, outside to inside", group="model",
                         toyfaces=(48, 64, 96), mnist=(128, 128, 256))
    layers: int = flag(2, "ResBlocks per block", high=20, toyfaces=1)
    target: str = flag("v", "what the UNet predicts", "eps", "v")
    # No flags: train_ldm notes here which autoencoder it found.
    autoencoder: str = ""
    ae_settings: dict = field(default=None, repr=False)

@dataclass
class SampleConfig(RunConfig):
    data: str = flag(None, "data set; if not given, that of the run", group="data and run")
    out: str = flag(None, "run folder; if not given, that of --data, or else the newest")
    data_root: str = flag(None, "folder that holds the data sets; if not given, as in training")
    n: int = flag(None, "images to make, of which samples.png shows 64 at most; if not given, "
                        "sample: 16, eval: 2000", group="sampling")
    batch: int = flag(64, "images at once on the device", high=10 ** 5)
    sampler: str = flag("dpm", "DDPM, DDIM, or DPM-Solver++(2M)", *LatentDiffusion.SAMPLERS)
    steps: int = flag(30, "denoising steps; give ddpm all 1000", high=1000)
    autoguidance: float = flag(1.5, "strength of autoguidance; 1 turns it off and makes sampling "
                               "twice as fast", low=0, high=10)
    save_images: bool = flag(False, "sample only: also write each image into samples/, in place of "
                             "those there", False, True)

class UserError(Exception):
    """A mistake that the user can repair. main prints its sentence, without a traceback."""

def require(condition, sentence):
    if not condition:
        raise UserError(sentence)

def check(setting, value):
    """The value in plain Python types, the only ones that load_file reads, to be safe. Raises
    UserError if it breaks the rule."""
    kind, rule = setting.type, setting.metadata
    if isinstance(value, (str, os.PathLike)):
        value = os.path.expanduser(value)  # ~/photos; this also makes a str of a Path
    value = np.asarray(value).tolist()  # NumPy's numbers, too, become plain ones
    if rule["choices"]:
        right = type(value) is kind and value in rule["choices"]
        advice = f"choose one of {', '.join(map(str, rule['choices']))}"
    elif kind is str:
        right = type(value) is str and value != ""
        advice = f"give a text that is not empty ({rule['text']})"
    else:
        # A tuple, as --widths is, is checked number by number.
        numbers = value if kind is tuple and isinstance(value, list) else [value]
        right = all(type(x) in (int, kind) and rule["low"] <= x <= rule["high"] for x in numbers)
        number = "a number" if kind is float else "a whole number"
        advice = f"give {number} from {rule['low']} to {rule['high']}"
    require(right, f"--{setting.name.replace('_', '-')} {value}: {advice}")
    return tuple(numbers) if kind is tuple else kind(value)  # 1 becomes 1.0 if kind is float

def resolve(cls, given):
    """Settings of class cls: the defaults, then the data set's preset, then what is given, a
    dict {name: value}. Raises UserError with the flag and its rule."""
    cfg = cls(**given)
    for setting in [f for f in fields(cls) if f.metadata]:  # the others are no flags
        value = getattr(cfg, setting.name)
        if setting.name not in given:
            value = setting.metadata["presets"].get(cfg.data, value)
        # None is allowed only where it is the default, and stays unchecked there.
        if value is not None or setting.default is not None:
            setattr(cfg, setting.name, check(setting, value))

    if cfg.data and not cfg.out:
        cfg.out = os.path.join("runs", os.path.basename(os.path.abspath(cfg.data)))
    # Later commands take these two from the checkpoint, and may start in another folder.
    cfg.data_root = cfg.data_root and os.path.abspath(cfg.data_root)
    if cfg.data not in (None, "toyfaces", "mnist", "celebhq"):
        cfg.data = os.path.abspath(cfg.data)

    if issubclass(cls, TrainConfig):
        if cfg.data not in ("toyfaces", "mnist"):
            # Except for celebhq, data is an absolute path, and then Path ignores data_root.
            photos = Path(cfg.data_root, cfg.data).resolve()
            out = Path(cfg.out).resolve()
            mixed = out.is_relative_to(photos) or photos in (out / "samples", out / "pictures")
            require(not mixed, f"--out {cfg.out}: its pictures would mix with those in {photos}; "
                    "give another folder")

        folders = (Path(cfg.out), *Path(cfg.out).parents)
        folder = next((p for p in folders if p.exists()), folders[0])  # a drive can be missing
        require(folder.is_dir() and os.access(folder, os.W_OK), f"--out {cfg.out}: {folder} is no "
                "folder that you may write to; give another")
        right = len(cfg.widths) > 1 and not any(c % 4 for c in cfg.widths)
        require(right, f"--widths {' '.join(map(str, cfg.widths))}: give two or more multiples of "
                "4, because norms and attention divide them by 4")
    if cls is AEConfig:
        factor = 2 ** (len(cfg.widths) - 1)
        require(cfg.size % factor == 0, f"--size {cfg.size}: must be divisible by {factor}, "
                f"because the encoder halves it {len(cfg.widths) - 1} times")
    return cfg

# The rest of this section is for both stages, except update_ema, which only stage 2 uses.

def learning_rate(cfg, step):
    """Rises evenly over 500 steps, or 5 % of all if that is less, stays at cfg.lr, and falls
    evenly in the second half, almost to 0, so that the weights come to rest."""
    rise = step / min(500, 0.05 * cfg.steps)
    fall = (cfg.steps + 1 - step) / (0.5 * cfg.steps)
    return cfg.lr * min(1, rise, fall)

# Adam scales each number of a gradient on its own. But a weight is a matrix, with a row for
# each output and a column for each input (in a 3x3 convolution nine for each channel). Its
# gradient is a sum of patterns, each of them a column times a row times a strength s (SVD). A
# few are so strong that they dominate the gradient. Adam sees single numbers and no patterns,
# so the strong ones dominate its steps, too. Muon (MomentUm, Orthogonalised: Jordan et al.
# 2024, kellerjordan.github.io/posts/muon) takes a running mean of the gradient, in which
# patterns of mere chance fade, and then a step of the same length for each pattern, so that
# weak ones are learnt, too. Both stages need about half as many steps as with Adam.

class Muon(torch.optim.Adam):
    """Muon for the weights of Conv2d and Linear. Adam updates all other parameters of the
    network (biases, norms, a codebook), with these betas. optimise sets lr."""
    def __init__(self, net, betas):
        super().__init__(net.parameters(), betas=betas, fused=True)

        # In fp16 (section 14) a gradient can become infinite, and then the step has to be left
        # out. GradScaler (see optimise) does that, unless an optimiser claims to do it itself.
        # A fused Adam, which updates all weights at once, makes this claim. Muon cannot do it,
        # so it takes the claim back here.
        self._step_supports_amp_scaling = False
        self.matrices = [layer.weight for layer in net.modules()
                         if isinstance(layer, (nn.Conv2d, nn.Linear))]
        for w in self.matrices:
            # Adam does not update these (see the end of step), but it saves and loads their
            # state: exp_avg, the mean of gradients, and step, which Muon does not use, but
            # which Adam looks for when it loads.
            self.state[w].update(exp_avg=torch.zeros_like(w), step=torch.zeros(()))

    @staticmethod
    def orthogonalise(G):
        """Makes all patterns of matrices G (n, rows, columns) about equally strong.
        G = U S V^T: column i of U times row i of V^T is pattern i, and the diagonal of S has
        its strength s. We want U V^T, where each s is 1. U^T U and V^T V are I. So if X =
        U S V^T, then X X^T X = U S^3 V^T, and (X X^T)^2 X = U S^5 V^T: only s changes.
        Applied five times, s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5 (Jordan's numbers) takes
        nearly every s to 0.7 .. 1.2. That is much faster than to compute U, S and V."""
        if G.shape[1] > G.shape[2]:  # transposed, so that X X^T is small
            return Muon.orthogonalise(G.mT).mT
        X = G / (G.norm(dim=(1, 2), keepdim=True) + 1e-12)  # so that every s is at most 1
        if X.is_cuda:
            X = X.half()  # faster, and s need not be precise
        for _ in range(5):
            XXT = X @ X.mT
            # baddbmm(A, B, C) is beta A + alpha B C.
            poly = torch.baddbmm(XXT, XXT, XXT, beta=-4.775, alpha=2.0315)
            X = torch.baddbmm(X, poly, X, beta=3.4445)
        return X.float()

    @torch.no_grad()
    def step(self, closure=None):
        groups = {}  # {shape: weights}: those of one shape are stacked, which is faster
        for w in self.matrices:
            if w.grad is not None:
                groups.setdefault(w.shape, []).append(w)

        for weights in groups.values():
            grads = [w.grad for w in weights]
            means = [self.state[w]["exp_avg"] for w in weights]
            # a.lerp(b, r) is (1 - r) a + r b. These are running means of the gradient, and
            # `ahead` is what they would be if this gradient came again (Nesterov's momentum).
            torch._foreach_lerp_(means, grads, 0.05)
            ahead = torch._foreach_lerp(means, grads, 0.05)

            # Any order of columns would do. A convolution's c_in goes last because in memory
            # it is last, too (section 14). For Linear, movedim and flatten do nothing.
            G = torch.stack([m.movedim(1, -1) for m in ahead])     # (n, c_out, 3, 3, c_in)
            X = self.orthogonalise(G.flatten(2))                   # (n, c_out, 9*c_in)

            # Say X is m x k with m <= k. It has m strengths s near 1, and m k numbers, whose
            # squares sum to the sum of s^2, about m. So a typical number is 1 / sqrt(k). We
            # make it 0.4 lr, the usual size of Adam's steps (Liu et al. 2025, 2502.16982), so
            # that one lr suits both.
            size = 0.4 * self.param_groups[0]["lr"] * max(X.shape[1:]) ** 0.5
            steps = X.view(G.shape).movedim(-1, 2)                 # (n, c_out, c_in, 3, 3)
            torch._foreach_add_(weights, steps.unbind(), alpha=-size)
            for w in weights:
                w.grad = None  # Adam leaves parameters without a gradient as they are
        super().step()

def optimise(scaler, optimiser, net, lr):
    """Cuts the norm of all gradients to 1 at most, so that no batch has too much say, takes one
    step, and clears them."""
    optimiser.param_groups[0]["lr"] = lr
    # In fp16 the loss was scaled up, lest small gradients become 0. This scales them back.
    scaler.unscale_(optimiser)
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    scaler.step(optimiser)  # skipped if a gradient overflowed in fp16
    optimiser.zero_grad()

@torch.no_grad()
def update_ema(ema, model, step):
    """ema = decay ema + (1 - decay) model: an average over the last 200 steps or so. Before
    step 1790, 1 - decay is about 9 / step, and the average is over the last ninth of all steps
    so far, so that the random start fades."""
    decay = min(0.995, (1 + step) / (10 + step))
    # All weights in one go: a loop over them would add 8 % to a step of the UNet (H100).
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---- 9. Stage 1 --------------------------------------------------------------------------
# The recipe is VQGAN's (Esser et al. 2021, arXiv 2012.09841, section 3.1): reconstruction,
# LPIPS, the latent's own losses, and a GAN that joins in late, because it can only add texture
# to what is already in place. VQGAN sets the GAN's weight anew in each step, so that in the
# last layer the GAN's gradient is as large as that of reconstruction and LPIPS. Here the weight
# rises over 1000 steps, so that an untrained discriminator does no harm, and then falls with
# the learning rate. Without that fall, the eyes of celebhq keep a coloured grain. Run (section
# 13) counts steps, logs, saves and resumes. to_float (section 12) takes bytes to [-1, 1]. psnr,
# codebook_use and latent_picture (section 13) show what comes out. pick_device, autocast, place
# and compile_networks (section 14) are for speed.

LPIPS_WEIGHTS = Path(__file__).resolve().with_name("lpips_weights.pth")

def build_autoencoder(cfg):
    """The VQVAE or VAE of an AEConfig, with random weights."""
    sizes = (cfg.channels, cfg.widths, cfg.layers, cfg.z_channels)
    require(cfg.ae in ("vq", "kl"), f"--ae {cfg.ae}: choose vq or kl")  # resolve may be skipped
    return VQVAE(*sizes, cfg.codebook_size) if cfg.ae == "vq" else VAE(*sizes)

def draw_images(images, cfg, device):
    """A random batch (B, C, H, W) in [-1, 1]; with cfg.flip about half of it is mirrored. Each
    batch is drawn anew from all images, so there are steps but no epochs."""
    x = images[torch.randint(len(images), (cfg.batch,))]
    if device.type == "cuda":  # pinned memory can be copied while Python goes on
        x = x.pin_memory().to(device, non_blocking=True)
    x = to_float(x, device)
    if cfg.flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
    return x

def train_ae(cfg):
    """Trains a VQVAE or VAE up to cfg.steps and leaves ae.pt in cfg.out. Raises UserError, and
    FileNotFoundError for the weights of LPIPS."""
    device, dtype = pick_device(cfg)
    images, held_out, name = load_images(cfg)
    cfg = replace(cfg, pictures=name)
    preview = to_float(held_out[:8], device)
    lpips = place(LPIPS(LPIPS_WEIGHTS), device) if cfg.perceptual_weight > 0 else None
    weights = {"recon": 1.0, "codebook": cfg.codebook_weight, "commit": cfg.commit_weight,
               "kl": cfg.kl_weight, "perceptual": cfg.perceptual_weight}
    disc_start = cfg.steps // 4 if cfg.disc_start is None else cfg.disc_start

    torch.manual_seed(cfg.seed)
    ae = place(build_autoencoder(cfg), device)
    disc = place(PatchGAN(cfg.channels), device)
    opt = Muon(ae, betas=(0.5, 0.9))  # VQGAN's betas
    opt_d = torch.optim.Adam(disc.parameters(), betas=(0.5, 0.9), fused=True)  # as in VQGAN
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    run = Run(cfg, "ae", dict(ae=ae, disc=disc, opt=opt, opt_d=opt_d, scaler=scaler))
    if run.step < cfg.steps and Path(cfg.out, "ldm.pt").exists():
        say(f"warning: {cfg.out}/ldm.pt holds the old autoencoder, and sample and eval will go on "
            "with that. For the new one move ldm.pt away, and run train-ldm")
    if cfg.gan_weight > 0:
        say(f"the GAN joins in after step {disc_start}")
    compile_networks(cfg, device, *filter(None, (ae, lpips)))  # compiling disc gained nothing

    for step in run.steps():
        lr = learning_rate(cfg, step)
        ramp = min(1, max(0, step - disc_start) / 1000)
        weights["gan"] = cfg.gan_weight * ramp * lr / cfg.lr
        # At 1, 101 and so on: usage is logged at 100, 200 and so on, and a restart clears it.
        if cfg.ae == "vq" and step % 100 == 1:
            with torch.no_grad(), autocast(device, dtype):
                ae.quantizer.restart(ae.encode(draw_images(images, cfg, device)))

        for _ in range(cfg.accum):
            x = draw_images(images, cfg, device)                   # (B, C, H, W)

            # (1) Autoencoder: minimise the weighted sum of its losses.
            with autocast(device, dtype):
                x_rec, losses = ae(x)
                losses["recon"] = F.l1_loss(x_rec, x) if cfg.recon == "l1" else F.mse_loss(x_rec, x)
                if lpips:
                    losses["perceptual"] = lpips(x_rec, x).mean()
                if weights["gan"] > 0:
                    # Autograd notes in the forward pass what gets a gradient: here x_rec, but
                    # not the discriminator's weights, although at backward they require one
                    # again.
                    disc.requires_grad_(False)
                    losses["gan"] = generator_loss(cfg.gan, disc(x_rec))
                    disc.requires_grad_(True)
                loss = sum(weights[name] * value for name, value in losses.items())
            scaler.scale(loss / cfg.accum).backward()  # gradients add up, so / accum averages them

            # (2) Discriminator: tell photos from reconstructions.
            if weights["gan"] > 0:
                with autocast(device, dtype):
                    real, fake = disc(x), disc(x_rec.detach())     # (B, 1, h', w')
                    losses["disc"] = discriminator_loss(cfg.gan, real, fake)
                scaler.scale(losses["disc"] / cfg.accum).backward()
                losses |= {"score_real": real.mean(), "score_fake": fake.mean()}  # only logged
            run.add(losses)

        optimise(scaler, opt, ae, lr)
        if weights["gan"] > 0:
            optimise(scaler, opt_d, disc, lr)
        scaler.update()

        if run.due(100) or run.due(cfg.save_every):
            with torch.no_grad(), autocast(device, dtype):
                z = ae.encode(preview)
                preview_rec = ae.decode(z).clamp(-1, 1)
            figures = {"held_psnr": psnr(preview_rec, preview).mean(), "z_std": z.std()}
            if cfg.ae == "vq":
                figures["codes_percent"], figures["perplexity"] = codebook_use(ae.quantizer.usage)
            run.log(figures)
        if run.due(cfg.save_every):
            run.save()
            # Three rows: images, reconstructions, latents.
            rows = torch.cat([preview, preview_rec, latent_picture(z, preview)])
            run.show(image_grid(rows, len(preview)))


# ---- 10. Stage 2 -------------------------------------------------------------------------
# The autoencoder is frozen now, so the images are encoded once, before the first step. Then the
# loop is short: draw latents, noise and t, mix latents and noise, let the UNet predict, and
# take the squared error (DDPM Eq. 14, for eps). An answer of 0 has a loss of 1, the variance
# of v or eps. For v, 0.5 on photos is no failure: nobody can tell exactly what is noise.
# The loss hardly falls while samples get better, so look at the pictures. The held-out loss, on
# images that are never trained on, rises if the UNet learns the others by heart.

def load_autoencoder(path, device):
    """The autoencoder of a checkpoint ae.pt, frozen, and its settings. Raises UserError."""
    ckpt = load_model(path, "ae")
    cfg = AEConfig(**ckpt["config"])
    ae = build_autoencoder(cfg)
    ae.load_state_dict(ckpt["parts"]["ae"])
    return place(ae, torch.device(device)).eval().requires_grad_(False), cfg

def load_same_images(cfg, ae_cfg):
    """The images that an autoencoder was trained on, and those held out. Raises UserError if
    they changed, since images that it was trained on might now be held out."""
    data, root = cfg.data or ae_cfg.data, cfg.data_root or ae_cfg.data_root
    require(data not in ("toyfaces", "mnist") or data == ae_cfg.pictures, f"--data {data}: stage 1 "
            f"was trained on {ae_cfg.data}; give that")
    images, held_out, name = load_images(replace(ae_cfg, data=data, data_root=root))
    require(name == ae_cfg.pictures, f"--data {data}: stage 1 saw other pictures; give those "
            "as they were, or run train-ae on these, with another --out")
    return images, held_out

def build_ldm(cfg, ae, ae_cfg):
    """The LatentDiffusion of an LDMConfig for an autoencoder, with a random UNet."""
    side = ae_cfg.size // 2 ** (len(ae_cfg.widths) - 1)
    # The UNet halves the side as long as it is even and at least 4 is left.
    downs = sum(side % 2 ** i == 0 and side // 2 ** i >= 4 for i in range(1, len(cfg.widths)))
    unet = UNet(ae_cfg.z_channels, cfg.widths, downs, cfg.layers)
    z_shape = (ae_cfg.z_channels, side, side)
    return LatentDiffusion(ae, unet, NoiseScheduler(target=cfg.target), z_shape)

@torch.no_grad()
def encode_images(ae, images, device, dtype, flip=False):
    """uint8 (N, C, H, W) -> latents (N, D, h, w), float16, on the device. With flip the images
    are mirrored, batch by batch, since a second copy of all might not fit into memory."""
    latents = []
    for batch in progress(images.split(32), "encoding, batch"):
        x = to_float(batch, device)
        with autocast(device, dtype):
            latents.append(ae.encode(x.flip(3) if flip else x).half())
    return torch.cat(latents)

@torch.no_grad()
def held_out_loss(ldm, z0, dtype):
    """The loss of ema_unet on z0 (B, D, h, w), always with the same noise and t. t runs evenly
    from 0 for the first image to T-1 for the last. Weights make each error count as often as
    its t would be drawn, so that the mean can be compared with the training loss."""
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0)).to(z0.device)
    t = torch.linspace(0, ldm.scheduler.T - 1, len(z0), device=z0.device).round().long()
    with autocast(z0.device, dtype):
        pred = ldm.ema_unet(ldm.scheduler.add_noise(z0, eps, t), t)
    errors = (pred - ldm.scheduler.target_of(z0, eps, t)).square().mean((1, 2, 3))
    weights = ldm.scheduler.step_weights()[t]
    return (weights * errors).sum() / weights.sum()

def train_ldm(cfg):
    """Trains a UNet up to cfg.steps and leaves ldm.pt in cfg.out. Raises UserError."""
    device, dtype = pick_device(cfg)
    ae, ae_cfg = load_autoencoder(Path(cfg.out, "ae.pt"), device)
    images, held_out = load_same_images(cfg, ae_cfg)
    name = fingerprint(*ae.state_dict().values())  # a run resumes only with the same autoencoder
    cfg = replace(cfg, ae_settings=asdict(ae_cfg), autoencoder=name)

    torch.manual_seed(cfg.seed)
    ldm = place(build_ldm(cfg, ae, ae_cfg), device).requires_grad_(False)
    unet = copy.deepcopy(ldm.ema_unet).requires_grad_(True)  # the third copy, which is trained
    opt = Muon(unet, betas=(0.9, 0.99))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(cfg, "ldm", dict(unet=unet, ldm=ldm, opt=opt, scaler=scaler))

    z_all = encode_images(ae, images, device, dtype)               # (N, D, h, w)
    if cfg.flip:  # mirroring an image does not just mirror its latent
        z_all = torch.cat([z_all, encode_images(ae, images, device, dtype, flip=True)])
    ldm.measure(z_all)
    say(f"latents {tuple(z_all.shape)}, mean {ldm.mean.flatten()}, std {ldm.std.flatten()}")
    # Noise and t are always the same for these, so 64 images are enough for a smooth curve.
    z0_held_out = ldm.normalise(encode_images(ae, held_out[:64], device, dtype))
    compile_networks(cfg, device, unet)

    for step in run.steps():
        for _ in range(cfg.accum):
            z = z_all[torch.randint(len(z_all), (cfg.batch,), device=device)]
            z0 = ldm.normalise(z)                                  # (B, D, h, w)
            eps = torch.randn_like(z0)
            t = torch.multinomial(ldm.scheduler.step_weights(), cfg.batch, replacement=True)
            z_t = ldm.scheduler.add_noise(z0, eps, t)
            with autocast(device, dtype):
                loss = F.mse_loss(unet(z_t, t), ldm.scheduler.target_of(z0, eps, t))
            scaler.scale(loss / cfg.accum).backward()  # gradients add up, so / accum averages them
            run.add({"loss": loss})

        optimise(scaler, opt, unet, learning_rate(cfg, step))
        scaler.update()
        update_ema(ldm.ema_unet, unet, step)
        # After a fifth of the training the early UNet stays as it is, worse than the other.
        if step <= cfg.steps // 5:
            update_ema(ldm.early_unet, unet, step)

        if run.due(100) or run.due(cfg.save_every):
            run.log({"held_loss": held_out_loss(ldm, z0_held_out, dtype)})
        if run.due(cfg.save_every):
            run.save()  # before sampling, so a second Ctrl-C loses nothing
            run.show(image_grid(ldm.sample(16, cfg.seed, dtype=dtype), 8))


# ---- 11. Sampling and evaluation ---------------------------------------------------------
# `sample` loads a run and draws from it. `eval` measures it on images that were held out. The
# Frechet distance fits a Gaussian to features of real images, here VGG16's, and one to those of
# generated images, and says how far these two are apart (Heusel et al. 2017, arXiv 1706.08500).
# It falls when images get more realistic, and when they get as varied as real ones. Published
# distances (FID) use Inception, another classifier, so they cannot be compared with ours.

def load_ldm(path, device="cpu"):
    """The LatentDiffusion of a checkpoint ldm.pt, frozen, on the device. Raises UserError."""
    ckpt = load_model(path, "ldm", mmap=True)  # much of the file is not needed
    cfg = LDMConfig(**ckpt["config"])
    ae_cfg = AEConfig(**cfg.ae_settings)
    ldm = build_ldm(cfg, build_autoencoder(ae_cfg), ae_cfg)
    ldm.load_state_dict(ckpt["parts"]["ldm"])
    ldm.ae_cfg = ae_cfg  # a note for sample and evaluate: which data, which size
    return place(ldm, torch.device(device)).eval().requires_grad_(False)

def find_run(cfg, *names):
    """The run folder --out, or else the newest with one of these files. Raises UserError."""
    # If --data was given, resolve has set cfg.out to runs/ and its name.
    folders = [Path(cfg.out)] if cfg.out else Path("runs").glob("*")
    found = [folder / name for folder in folders for name in names if (folder / name).exists()]
    require(found, f"no {' or '.join(names)} in {os.path.abspath(cfg.out or 'runs')}; run train-ae "
            "and train-ldm first, or for toy faces: python ldm.py demo")
    return max(found, key=os.path.getmtime).parent

def sample(cfg):
    """Writes samples.png (the first 64), progress.png and, with save_images, samples/*.png."""
    device, dtype = pick_device(cfg)
    folder = find_run(cfg, "ldm.pt")
    ldm = load_ldm(folder / "ldm.pt", device)
    # A folder of photos may have moved since the training, so only its own name is compared.
    same = cfg.data is None or Path(cfg.data).name == Path(ldm.ae_cfg.data).name
    require(same, f"--data {cfg.data}: {folder} was trained on {ldm.ae_cfg.data}; leave --data "
            "out, or name another run with --out")
    require(os.access(folder, os.W_OK), f"{folder} cannot be written; copy it, and name the copy "
            "with --out")

    trace = []
    images = ldm.sample(cfg.n or 16, cfg.seed, cfg.sampler, cfg.steps, cfg.batch, dtype,
                        cfg.autoguidance, trace, progress)
    save_picture(folder / "progress.png", denoising_strip(trace, ldm))
    columns = math.ceil(min(64, len(images)) ** 0.5)
    save_picture(folder / "samples.png", image_grid(images[:64], columns))
    if cfg.save_images:
        for old in folder.glob("samples/*.png"):  # those of a larger set would mix in
            old.unlink()
        for i, image in enumerate(progress(images, "writing image")):
            save_picture(folder / "samples" / f"{i:06}.png", to_picture(image))
    say(f"wrote {(folder / 'samples.png').absolute()}")

def frechet_distance(a, b):
    """The squared distance, as in FID, of Gaussians fitted to features a, b (N, c), with means
    mu and covariances S: |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))."""
    a, b = a.double(), b.double()  # large sums almost cancel, and float32 loses too many digits
    S_a, S_b = torch.cov(a.T), torch.cov(b.T)                      # (c, c)
    # The trace of a root is the sum of the roots of eigenvalues, >= 0 here but for rounding.
    trace_of_root = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * trace_of_root

@torch.no_grad()
def evaluate(cfg):
    """Prints and returns {figure: value} on held-out images. Raises UserError, and
    FileNotFoundError for the weights of LPIPS."""
    device, dtype = pick_device(cfg)
    folder = find_run(cfg, "ldm.pt", "ae.pt")
    ldm = load_ldm(folder / "ldm.pt", device) if (folder / "ldm.pt").exists() else None
    ae, ae_cfg = (ldm.ae, ldm.ae_cfg) if ldm else load_autoencoder(folder / "ae.pt", device)
    _, held_out = load_same_images(cfg, ae_cfg)
    lpips = place(LPIPS(LPIPS_WEIGHTS), device)

    def features(x):
        """x (B, C, H, W) -> (B, 512): VGG16's last map, averaged over the positions."""
        return lpips.features(x.to(device))[-1].mean((2, 3)).cpu()

    rows = []
    for batch in progress(held_out.split(32), "judging, batch"):
        x = to_float(batch, device)
        x_rec = ae.decode(ae.encode(x)).clamp(-1, 1)
        rows.append((psnr(x_rec, x), lpips(x_rec, x), features(x), features(x_rec)))
    psnrs, distances, real, rebuilt = map(torch.cat, zip(*rows))
    table = {"PSNR, dB": psnrs.mean(), "LPIPS": distances.mean(),
             "FD, reconstructions": frechet_distance(rebuilt, real)}
    if ldm:
        n = max(2, cfg.n or 2000)  # a single image has no covariance
        images = ldm.sample(n, cfg.seed, cfg.sampler, cfg.steps, cfg.batch, dtype,
                            cfg.autoguidance, progress=progress)
        fake = torch.cat([features(part) for part in images.split(32)])
        table[f"FD, {n} samples ({cfg.sampler}, {cfg.steps} steps)"] = frechet_distance(fake, real)

    say(f"{folder.absolute()}, {len(held_out)} held-out images; FD is a Frechet distance of "
        "VGG16 features, and cannot be compared with a published FID")
    for name, value in table.items():
        say(f"  {name:42} {float(value):.4g}")
    if not ldm:
        say("there is no ldm.pt, so only stage 1 was judged")
    return table


# ---- 12. Data ----------------------------------------------------------------------------
# Every data set becomes one uint8 tensor (N, C, H, W) in memory. The last tenth, 2 to 1000
# images, is held out, since a network is to be judged on what it has not seen. The pictures of
# a folder are shuffled first, because neighbours may be alike.

SKIN = [(255, 224, 196), (240, 200, 160), (214, 160, 118), (160, 108, 72), (110, 72, 48)]
HAIR = [(30, 26, 24), (104, 62, 32), (232, 196, 92), (190, 74, 36), (84, 92, 200)]
BACK = [(150, 205, 240), (250, 214, 150), (186, 230, 180), (240, 180, 190), (206, 190, 240)]

def draw_face(index, size):
    """Toy face number `index`, uint8 (size, size, 3): drawn four times as large and shrunk."""
    rng = np.random.default_rng(index)
    # Eyes have the colours of hair, too.
    skin, hair, iris, back = (table[rng.integers(5)] for table in (SKIN, HAIR, HAIR, BACK))
    x, y, rx, ry = rng.uniform((-0.08, 0.02, 0.48, 0.60), (0.08, 0.12, 0.60, 0.70))
    gap, eye, mouth = rng.uniform((0.22, 0.14, 0.06), (0.28, 0.18, 0.20))
    canvas = Image.new("RGB", (4 * size, 4 * size), back)

    def ellipse(colour, x, y, rx, ry, start=0, end=360):
        """Half a side is 1, (0, 0) is the middle, y points down. Fills what a line from angle
        start to angle end cuts off (in degrees, clockwise)."""
        corners = (np.array([x - rx, y - ry, x + rx, y + ry]) + 1) * 2 * size
        ImageDraw.Draw(canvas).chord(corners.tolist(), start, end, colour)

    if rng.random() < 0.5:  # long hair
        ellipse(hair, x, y + 0.15, rx + 0.22, ry + 0.25)
    ellipse(skin, x, y, rx, ry)
    ellipse(hair, x, y, rx + 0.07, ry + 0.1, 205, 335)  # fringe
    for side in (x - gap, x + gap):
        for part, colour in ((1, "white"), (0.6, iris), (0.3, "black")):
            ellipse(colour, side, y, part * eye, part * 0.8 * eye)
    ellipse((150, 40, 50), x, y + 0.38, 0.28, mouth, 0, rng.choice([180, 360]))  # 180 is a smile
    return np.array(canvas.resize((size, size), Image.Resampling.BOX))

def toyfaces(indices, size=32):
    """Cartoon faces (N, 3, size, size), uint8, N = len(indices). Index i is always one face."""
    faces = np.stack([draw_face(i, size) for i in indices])
    return torch.from_numpy(faces).permute(0, 3, 1, 2)

PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26  # a long text inside a PNG does not make it unreadable

def decode_image(path, size, channels):
    """Any picture that PIL reads -> uint8 (size, size, channels): the centre square, upright.
    Transparency becomes white, 16 bits become 8. Raises what PIL raises on a broken file."""
    with Image.open(path) as img:
        img.draft(None, (2 * size, 2 * size))  # JPEG only: shrinks as it decodes
        with contextlib.suppress(Exception):  # the EXIF tag may be damaged
            img = ImageOps.exif_transpose(img)  # cameras store the turn as a tag
        if img.mode == "F":
            raise ValueError("its values are floats; save it with 8 or 16 bits")
        if img.mode.startswith("I"):  # 16 bits
            img = Image.fromarray((np.asarray(img).clip(0, 65535) / 257).round().astype(np.uint8))
        if img.has_transparency_data:
            white = Image.new("RGBA", img.size, "white")
            img = Image.alpha_composite(white, img.convert("RGBA"))
        img = img.convert("L" if channels == 1 else "RGB")
        img = ImageOps.fit(img, (size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(img).reshape(size, size, channels))

def load_folder(folder, size, channels):
    """The pictures of a folder and its subfolders, uint8 (N, channels, size, size), in an order
    that is random but always the same. Says what it leaves out, except hidden files
    and folders, often thumbnails. Raises UserError."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    files = [p for p in files if not any(name[0] == "." for name in p.relative_to(folder).parts)]
    known = Image.registered_extensions()
    left_out = [p.suffix.lower() for p in files if p.suffix.lower() not in known]
    for suffix in sorted(set(left_out)):
        say(f"left out {left_out.count(suffix)} files of type {suffix or '(none)'}: PIL cannot "
            "read them; photos among them have to be converted to JPEG")
    paths = [p for p in files if p.suffix.lower() in known]
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    paths = [paths[k] for k in order]
    images = torch.empty(len(paths), size, size, channels, dtype=torch.uint8)

    def decode(k):
        """Fills images[k] and returns None, or returns why this picture is left out."""
        try:
            images[k] = decode_image(paths[k], size, channels)
        except Exception as error:  # PIL raises many
            # An errno comes from the disk and not from the picture, so leaving the picture out
            # would be wrong. Next time it may be readable.
            require(not getattr(error, "errno", None), f"{paths[k]} cannot be read now ({error}); "
                    "try again, or move it away")
            return f"left out, because PIL could not read it: {paths[k]} ({error})"

    with ThreadPoolExecutor(4) as pool:
        faults = [*progress(pool.map(decode, range(len(paths))), "decoding", len(paths))]
    for fault in filter(None, faults):
        say(fault)
    good = [k for k, fault in enumerate(faults) if fault is None]
    if len(good) < len(images):  # indexing copies everything
        images = images[good]
    say(f"{folder}: {len(images)} pictures")
    return images.permute(0, 3, 1, 2)

def load_images(cfg):
    """(training images, held-out images, name), uint8; a tenth, 2 to 1000, is held out. For a
    folder the name has a checksum of its pictures, or of every n-th. Raises UserError."""
    root = Path(cfg.data_root)
    name = cfg.data
    if cfg.data == "toyfaces":
        images = toyfaces(range(10000), cfg.size)
    elif cfg.data == "mnist":
        try:
            images = datasets.MNIST(root, download=True).data[:, None]  # the test set stays unused
        except Exception as error:  # no internet, or broken files
            raise UserError(f"mnist cannot be downloaded ({type(error).__name__}); go online, or "
                            f"unpack its four files into {root}/MNIST/raw") from error
        images = TF.resize(images, [cfg.size, cfg.size])
    else:
        folder = root / "celebhq" if cfg.data == "celebhq" else Path(cfg.data)
        images = load_folder(folder, cfg.size, cfg.channels)
        require(len(images) > 2, f"--data {cfg.data}: {len(images)} pictures in {folder}; at least "
                "3 are needed. Put photos there, or give --data another folder, toyfaces or mnist. "
                "For CelebA-HQ see \"Where to get it\" in the README")
        name = f"{len(images)} pictures, {fingerprint(images[::max(1, len(images) // 100)])}"

    require(images.shape[1] == cfg.channels, f"--channels {cfg.channels}: {cfg.data} has "
            f"{images.shape[1]}, so leave --channels out")
    n = min(1000, max(2, len(images) // 10))
    return images[:-n], images[-n:], name

def to_float(images, device):
    """uint8 (B, C, H, W) -> float in [-1, 1] on the device."""
    return images.to(device).float() / 127.5 - 1


# ---- 13. Runs ----------------------------------------------------------------------------
# A run folder holds what a training writes: curves, pictures, and checkpoints with the log. A
# stopped run goes on with the same command, and a file under its own name is always whole.

# These settings may differ when a command goes on with a run. A changed --steps moves the fall
# of the learning rate, the start of the GAN and the end of the early UNet. A folder of data may
# have moved, since what counts is the checksum of its pictures.
MAY_CHANGE = ["out", "data", "data_root", "steps", "amp", "compile", "save_every"]
FORMAT = "ldm.py, format 9"  # counts up when the content of checkpoints changes

def say(*words):
    """print, but a closed terminal, or letters that it does not know, never end a training."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = " ".join(map(str, words)).encode(encoding, "backslashreplace").decode(encoding)
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)

def progress(items, label, total=None):
    """Yields the items. If that takes long, says every five seconds how far it is."""
    said_at = time.perf_counter()
    for done, item in enumerate(items):
        if time.perf_counter() - said_at > 5:
            say(f"{label} {done} of {total or len(items)}")
            said_at = time.perf_counter()
        yield item

def fingerprint(*tensors):
    """A short name for tensors: equal ones have equal names."""
    content = b"".join(x.cpu().contiguous().numpy().tobytes() for x in tensors)
    return hashlib.sha256(content).hexdigest()[:12]

@contextlib.contextmanager
def new_file(path):
    """A file to write under a temporary name, renamed at the end: it is whole or not there."""
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
        for wait in (0, 0.5, 2, 5):  # Windows refuses while a virus scanner or viewer has it open
            time.sleep(wait)
            with contextlib.suppress(PermissionError):
                os.replace(partial, path)
                return
        raise OSError("another program has it open")
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        # On a full disk torch.save raises a RuntimeError. Its context is the true reason. Other
        # RuntimeErrors may have no context.
        reason = error if isinstance(error, OSError) else (error.__context__ or error)
        raise UserError(f"{path} cannot be written ({reason}); make room, close programs that use "
                        "it, or see whether you may write there") from error

def save_picture(path, picture):
    with new_file(path) as file:
        picture.save(file, "PNG")

def load_file(path, kind, mmap=False):
    """A checkpoint. With mmap, tensors are read when they are used. Raises UserError."""
    try:  # weights_only: nothing in the file is executed
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return ckpt[f"{kind} of {FORMAT}"]
    except Exception as error:  # whatever disks, zip files and unpicklers raise
        raise UserError(f"{os.path.abspath(path)} cannot be read ({error!r:.60}). If it is not "
                        f"there, run train-{kind}. If you have access, it is damaged, or another "
                        "version of ldm.py wrote it: move it away and train again") from error

def load_model(path, kind, mmap=False):
    """load_file for a training that should be over; warns if it is not."""
    ckpt = load_file(path, kind, mmap)
    steps = ckpt["config"]["steps"]
    if ckpt["step"] < steps:
        say(f"warning: {path} stopped at step {ckpt['step']} of {steps}. To finish it, "
            f"run train-{kind} again with the same flags")
    return ckpt

class Run:
    """A training stage in its run folder: counts steps, logs, saves, and goes on after a stop.
    parts: {name: network, optimiser or scaler}, all that a checkpoint has to hold. Raises
    UserError if there is a checkpoint with other settings, but for MAY_CHANGE."""
    def __init__(self, cfg, stage, parts):
        self.cfg, self.stage, self.parts = cfg, stage, parts
        self.path = Path(cfg.out, f"{stage}.pt")
        self.step = 0  # how many are done
        self.rows = []  # of the log, {name: value}
        self.losses = {}  # {name: values since the last row}
        self.next_save = 0  # the checkpoint is not worth writing before this time

        say(f"train-{stage}: {cfg}")
        if self.path.exists():
            self.resume(load_file(self.path, stage))

    def resume(self, ckpt):
        # The order of the settings puts the cause first: the size of the pictures before their
        # checksum, which depends on it, and the autoencoder before its settings.
        for name, now in asdict(self.cfg).items():
            before = ckpt["config"][name]
            require(name in MAY_CHANGE or before == now, f"{self.path} was trained on "
                    f"{ckpt['config']['data']!s:.99} with different {name} ({before!s:.40}); give "
                    "that again, or move the file away")
        for name, state in ckpt["parts"].items():
            if state:  # a scaler that is off has none
                self.parts[name].load_state_dict(state)

        self.step = ckpt["step"]
        self.rows = ckpt["log"]
        say(f"going on after step {self.step}")

    def steps(self):
        """Yields the numbers of the steps still to do. After Ctrl-C, kill or a closed terminal
        the next step is the last. It is saved, then comes KeyboardInterrupt. The same signal
        a second time acts at once."""
        asked = []  # the signals that asked for a stop
        before = {}  # {signal: its handler until now}

        def stop(number, _):
            asked.append(number)
            signal.signal(number, before[number])  # so that a second one acts at once

        if threading.current_thread() is threading.main_thread():  # only this one gets signals
            # This is a set. Where there is no SIGHUP, as on Windows, a list would have SIGTERM
            # twice, and the second time take `stop` for the handler to go back to.
            for s in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if signal.getsignal(s) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    before[s] = signal.signal(s, stop)

        self.last = self.step >= self.cfg.steps
        self.counted_from = time.perf_counter()
        try:
            while not self.last:
                self.step += 1
                self.last = bool(asked) or self.step == self.cfg.steps
                # Random numbers depend on seed and step alone, also after a resume.
                torch.manual_seed(self.cfg.seed * 1_000_003 + self.step)
                yield self.step
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

        # The caller saved it, since due is true in the last step.
        say(f"step {self.step} is saved (--steps {self.cfg.steps}): {self.path.absolute()}")
        if asked:  # also in the very last step, lest demo goes on with the next stage
            raise KeyboardInterrupt

    def due(self, every):
        """Whether an interval ends with this step. The last step ends all of them."""
        return self.step % every == 0 or self.last

    def add(self, losses):
        """Notes losses, without reading them: that would make Python wait for the GPU."""
        for name, value in losses.items():
            # The next step of a compiled network may overwrite its outputs, so this is a copy.
            self.losses.setdefault(name, []).append(value.detach().clone())

    def log(self, figures):
        """Prints and notes the mean losses since the last row, and these figures. Raises
        UserError, before a save, if anything is not finite."""
        means = {name: torch.stack(values).mean() for name, values in self.losses.items()}
        row = {name: float(value) for name, value in (means | figures).items()}
        require(all(map(math.isfinite, row.values())), f"step {self.step} is not saved, because a "
                f"figure is not finite: {row}. If --amp is on, go on with --amp off. If not, move "
                f"{self.path} away if it is there, and start anew with a lower --lr")

        # The GAN's losses may have joined in halfway. The others have one value a batch.
        batches = max(map(len, self.losses.values()))
        pace = batches / (time.perf_counter() - self.counted_from)  # batches a second
        minutes = (self.cfg.steps - self.step) * self.cfg.accum / pace / 60
        say(f"{self.stage} {self.step}/{self.cfg.steps}  {pace * self.cfg.batch:.0f} images/s, "
            f"{minutes:.1f} minutes left ", *[f"{k} {v:.4g}" for k, v in row.items()])

        self.rows.append({"step": self.step} | row)
        self.losses = {}
        self.counted_from = time.perf_counter()

    def save(self):
        """Writes the checkpoint. One that takes long is written less often, so that training
        gets twenty times as much time as saving. If it cannot be written, that is a warning,
        since the next one may succeed. Only the last one raises UserError."""
        now = time.perf_counter()
        if not self.last and now < self.next_save:
            return

        parts = {name: part.state_dict() for name, part in self.parts.items()}
        ckpt = dict(step=self.step, config=asdict(self.cfg), log=self.rows, parts=parts)
        try:
            with new_file(self.path) as file:
                torch.save({f"{self.stage} of {FORMAT}": ckpt}, file)
        except UserError as error:
            if self.last:
                raise
            say(f"warning: {error}")
        done = time.perf_counter()
        self.next_save = done + 20 * (done - now)

    def show(self, picture):
        """Writes a picture and the curves."""
        folder = self.path.parent
        try:
            save_picture(folder / "pictures" / f"{self.stage}-{self.step:06d}.png", picture)
            save_picture(folder / f"{self.stage}-curves.png", draw_curves(self.rows))
        except UserError as error:  # a picture is not worth the end of a training
            say(f"warning: {error}")
        self.counted_from = time.perf_counter()  # saving is not training time

def psnr(x_rec, x):
    """Peak signal-to-noise ratio (B,) in dB of images in [-1, 1]: 10 log10(peak^2 / MSE)."""
    mse = (x_rec - x).square().mean((1, 2, 3)).clamp(min=1e-10)  # equal images: 106 dB
    return 10 * torch.log10(2 ** 2 / mse)

def codebook_use(picks):
    """Picks per code (K,) -> used codes in percent, and perplexity exp(-sum p log p): K if all
    codes are picked equally often, 1 if it is always the same one."""
    p = picks / picks.sum().clamp(min=1)
    return 100 * (p > 0).float().mean(), torch.special.entr(p).sum().exp()  # entr(p) = -p log p

def image_grid(images, columns):
    """Images (N, 1 or 3, H, W) in [-1, 1] -> one PIL picture; small ones are enlarged."""
    images = F.interpolate(images.float().cpu(), scale_factor=max(1, 96 // images.shape[-1]))
    return to_picture(utils.make_grid(images, columns, pad_value=-1))

def to_picture(image):
    """An image (1 or 3, H, W) in [-1, 1] -> a PIL picture."""
    return TF.to_pil_image(((image.clamp(-1, 1) + 1) * 127.5).round().byte())

def latent_picture(z, x):
    """Latents z (N, D, h, w) as images of the shape of x, (N, C, H, W): their first C
    channels as colours, or if D < C the first one as grey."""
    C = x.shape[1]
    z = z[:, :C] if z.shape[1] >= C else z[:, :1].expand(-1, C, -1, -1)
    z = (z - z.mean((0, 2, 3), keepdim=True)) / (3 * z.std((0, 2, 3), keepdim=True) + 1e-6)
    return F.interpolate(z, size=x.shape[2:])

def denoising_strip(trace, ldm):
    """Eight rows from noise to image. Each shows four samples: z_t, z_t decoded, z0 decoded."""
    rows = []
    for k in np.linspace(0, len(trace) - 1, 8).round().astype(int):
        z_t, z0 = trace[k]                                         # (4, D, h, w)
        x_t = ldm.decode(z_t)                                      # (4, C, H, W)
        rows += [latent_picture(z_t, x_t), x_t, ldm.decode(z0)]
    return image_grid(torch.cat(rows), 3 * len(z_t))

def draw_curves(rows):
    """A panel for each figure of the log, over the steps: a PIL picture, 800 pixels wide."""
    names = dict.fromkeys(["held_psnr", "held_loss", *rows[-1]])  # the most telling first
    names = [name for name in names if name in rows[-1] and name != "step"]
    image = Image.new("RGB", (800, 120 * len(names)), "white")
    draw = ImageDraw.Draw(image)
    for top, name in zip(range(20, image.height, 120), names):
        steps, values = np.array([(row["step"], row[name]) for row in rows if name in row]).T
        usual = values[len(values) // 20:]  # the first steps would flatten all others
        low, high = usual.min(), usual.max()
        x = 60 + 720 * steps / steps[-1]
        y = top + 70 * ((high - values) / max(high - low, 1e-12)).clip(0, 1)
        # Around the curve stand a frame, its name, its range on the left, and five steps below.
        draw.rectangle((60, top, 780, top + 70), outline="#cccccc")
        draw.line(list(zip(x, y)), fill="#1f5fbf", width=2)
        draw.text((60, top - 14), f"{name}, now {values[-1]:.4g}", 0)
        draw.text((5, top), f"{high:.4g}\n\n\n{low:.4g}", 0)
        for part in range(5):
            draw.text((60 + 180 * part, top + 72), f"{steps[-1] * part / 4:.0f}", 0, anchor="ma")
    return image


# ---- 14. Device and speed ----------------------------------------------------------------
# Nothing here changes what is computed, apart from rounding. Three things together make a step
# several times as fast: matrix products in 16 bits (autocast; bf16 has few digits, fp16 a small
# range), the memory layout that GPUs want, and torch.compile, which merges many small
# operations into few.

def pick_device(cfg):
    """The device, a GPU if there is one, and the dtype of autocast (None is plain float32)."""
    found = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if found else torch.device("cpu")
    amp = cfg.amp
    if amp == "auto" and device.type == "cuda":  # older GPUs only emulate bf16, slowly
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # "off", and "auto" where there is no CUDA, are not in the table and give None.
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)

def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype is not None)

def place(net, device):
    """Moves the network to the device. Channels are stored last, which GPUs prefer, but not on
    a Mac's GPU (MPS), where BatchNorm's gradients would be wrong (pytorch#175189)."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return net.to(device, memory_format=layout)

class OnePassGroupNorm(nn.GroupNorm):
    """nn.GroupNorm with var = E[x^2] - E[x]^2, so that one look at x gives mean and variance,
    and x keeps its channels last. Compiled, it takes a fifth off a UNet step (H100, bf16)."""
    def forward(self, x):
        x = x.float()  # the difference of two large numbers: bf16 has no digits to spare
        split = (self.num_groups, -1)
        mean = x.mean((2, 3)).unflatten(1, split).mean(2, keepdim=True)  # (B, groups, 1)
        mean_square = x.square().mean((2, 3)).unflatten(1, split).mean(2, keepdim=True)
        var = (mean_square - mean.square()).clamp(min=0)  # rounding can bring it below 0
        scale = self.weight.view(split) * (var + self.eps).rsqrt()  # (B, groups, c / groups)
        shift = self.bias.view(split) - mean * scale
        return x * scale.flatten(1)[:, :, None, None] + shift.flatten(1)[:, :, None, None]

def compile_networks(cfg, device, *networks):
    """Compiles networks for CUDA, in place, so that names in checkpoints stay. Where compiling
    does not work, it says so and goes on: on Windows, where PyTorch comes without Triton,
    which compiles for GPUs, and on any machine without a C compiler."""
    if not cfg.compile or device.type != "cuda":
        return
    try:
        torch.compile(nn.SiLU())(torch.zeros(8, device=device))  # a trial
    except Exception as error:  # of Dynamo, Inductor, Triton or the C compiler
        say("not compiled, so training is slower; the reason:", str(error).split("\n")[0])
        return

    say("compiling: the first step takes a minute or two")
    for net in networks:
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.__class__ = OnePassGroupNorm  # same weights, another forward
        # "reduce-overhead" records what the GPU does as a CUDA graph, and replays it in one
        # call. A replay overwrites the gradients that --accum has to add up, so it is only for
        # --accum 1.
        net.compile(dynamic=False, mode="reduce-overhead" if cfg.accum == 1 else "default")


# ---- 15. Command line --------------------------------------------------------------------
# Each command resolves its settings and calls one function, which a notebook can call as well.

def demo(cfg):
    """Both stages and samples, by default on toy faces, which need no download."""
    train_ae(resolve(AEConfig, asdict(cfg)))
    train_ldm(resolve(LDMConfig, asdict(cfg)))
    sample(resolve(SampleConfig, asdict(cfg) | {"n": 64}))

COMMANDS = {  # name: (settings, function, help)
    "demo": (RunConfig, demo, "start here: both stages and samples, in minutes on a laptop"),
    "train-ae": (AEConfig, train_ae, "stage 1: train the autoencoder"),
    "train-ldm": (LDMConfig, train_ldm, "stage 2: train the diffusion model on its latents"),
    "sample": (SampleConfig, sample, "make new images"),
    "eval": (SampleConfig, evaluate, "measure a run on held-out images")}

def build_parser():
    """A subcommand for each of COMMANDS, with the flags of its settings."""
    parser = argparse.ArgumentParser(prog="ldm.py", description="Latent diffusion in one file.")
    subparsers = parser.add_subparsers(dest="command")
    special = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"type": int, "nargs": "+"}}
    for command, (cls, _, purpose) in COMMANDS.items():
        sub = subparsers.add_parser(command, help=purpose, argument_default=argparse.SUPPRESS)
        for setting in [f for f in fields(cls) if f.metadata]:
            rule = setting.metadata
            text = rule["text"]
            if rule["group"]:  # lasts until a field names another
                group = sub.add_argument_group(rule["group"])
            if setting.default is not None:
                others = [f"; {data} {value}" for data, value in rule["presets"].items()]
                text = f"{text} (default: {setting.default}{''.join(others)})"
            kind = {"type": setting.type, "choices": rule["choices"] or None}
            group.add_argument("--" + setting.name.replace("_", "-"), help=text,
                               **special.get(setting.type, kind))
    return parser

def main(argv=None):
    """Runs a command line and returns the exit code: 0 done, 2 an error that the user can mend,
    130 stopped. For a wrong flag argparse raises SystemExit(2)."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))  # SUPPRESS leaves only what was typed
    command = given.pop("command")
    if command is None:
        parser.print_help()
        return 0

    cls, function, _ = COMMANDS[command]
    if not torch.accelerator.is_available():
        say("no GPU was found, so this runs on the CPU")
    try:
        function(resolve(cls, given))
        return 0
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except (UserError, OSError) as error:
        message = error
    except (MemoryError, RuntimeError) as error:
        # PyTorch raises a RuntimeError. A GPU's has the first words, a CPU's the second on
        # Linux and the third on Windows.
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in words):
            raise
        message = ("out of memory. Give a smaller --batch; demo has none, so run train-ae, "
                   "train-ldm and sample instead. A training that has begun cannot change it: "
                   "first move its file away, ae.pt of train-ae or ldm.pt of train-ldm. If the "
                   "images alone are too many for the memory, take fewer of them")
    print(f"ldm.py: error: {message}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
