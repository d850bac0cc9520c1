"""ldm.py: unconditional latent diffusion from scratch, in one readable file.

A diffusion model makes images out of noise by removing a little of it, many times. In pixel space
nearly all of that work goes into details that nobody sees. Latent diffusion (Rombach et al. 2022,
arXiv 2112.10752) therefore splits it in two:

  stage 1  an autoencoder learns to turn an image x into a small latent z, and back    (train-ae)
  stage 2  a diffusion model learns to make new z out of noise; decoding them gives x  (train-ldm)

  python ldm.py demo                      # both stages on cartoon faces; a laptop will do
  python ldm.py train-ae  --data celebhq  # stage 1: VQVAE (or --ae kl) + LPIPS + PatchGAN
  python ldm.py train-ldm --data celebhq  # stage 2: UNet on the latents
  python ldm.py sample                    # new images from the newest run
  python ldm.py eval                      # PSNR, LPIPS, Frechet distance on held-out images

Letters, the same in code and tests, mostly those of the papers:
  B batch   C image channels   H W image height, width   D latent channels   h w latent size
  K codebook size   T diffusion steps   x image in [-1, 1]   z latent   eps Gaussian noise
  z_e, z_q latent before, after quantising   z0 normalised, z_t noisy   t step, 0 .. T-1
  N images   c channels inside a network, where x, h may be features   lambda = log(alpha / sigma)
  abar product of 1 - beta   alpha = sqrt(abar), not DDPM's 1 - beta   sigma = sqrt(1 - abar)

To learn the subject, read sections 1 to 6, then 9 and 10 with the three short functions at the
start of 8; the rest is what any training program needs. Table of contents: grep "^# ----" ldm.py
"""
import argparse
import contextlib
import copy
import glob
import hashlib
import io
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision import datasets, models, utils
from torchvision.transforms import functional as TF


# ---- 1. Blocks: one set for the encoder, the decoder and the UNet -------------------------------
# After DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B), with four heads of attention. Each is
# built from those above it; sinusoids are for the UNet alone.

def group_norm(c):
    """Mean 0, variance 1 per group of channels: at most 32 groups, of at least 4 channels."""
    return nn.GroupNorm(math.gcd(32, c // 4), c)  # c: a multiple of 4

def norm_silu_conv(c_in, c_out, bias=True):
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
    return nn.Sequential(group_norm(c_in), nn.SiLU(), conv)

def sinusoids(t, dim):
    """Steps t (B,) -> (B, dim): sines and cosines, wavelengths from 2 pi to almost 20000 pi."""
    freqs = 10000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs                         # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)

class Attention(nn.Module):
    """(B, c, h, w) -> the same shape: every position looks at every other one; residual."""
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(c)
        self.qkv = nn.Linear(c, 3 * c)
        self.proj = nn.Linear(c, c)
        nn.init.zeros_(self.proj.weight)  # starts near the identity: gradients pass

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)        # (B, h*w, c)
        qkv = self.qkv(tokens).unflatten(2, (3 * self.heads, -1))  # (B, h*w, 3*heads, c/heads)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)  # (B, heads, h*w, c/heads)
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(c/heads)) v
        out = self.proj(out.transpose(1, 2).flatten(2))         # (B, h*w, c)
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])

class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W): two convolutions and a shortcut around them, attention
    if heads > 0. t_dim: the width of a time embedding (B, t_dim), if there is one."""
    def __init__(self, c_in, c_out, t_dim=None, heads=0):
        super().__init__()
        self.conv1 = norm_silu_conv(c_in, c_out, bias=False)  # the next norm has a bias
        self.conv2 = norm_silu_conv(c_out, c_out, bias=False)
        self.time = nn.Linear(t_dim, c_out) if t_dim else None
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, heads) if heads > 0 else nn.Identity()
        nn.init.zeros_(self.conv2[-1].weight)  # starts near the shortcut

    def forward(self, x, t_emb=None):
        h = self.conv1(x)                                       # (B, c_out, H, W)
        if self.time is not None:  # t decides a shift per channel
            h = h + self.time(t_emb)[:, :, None, None]
        return self.attention(self.shortcut(x) + self.conv2(h))

class Stack(nn.Sequential):
    """Layers in a row, of which the ResBlocks get the time embedding too."""
    def forward(self, x, t_emb=None):
        for layer in self:
            x = layer(x, t_emb) if isinstance(layer, ResBlock) else layer(x)
        return x

def res_blocks(c_in, c_out, n, t_dim, heads):
    """A list of `n` ResBlocks, of which the first one changes the width."""
    widths = [c_in] + n * [c_out]
    return [ResBlock(a, b, t_dim, heads) for a, b in zip(widths, widths[1:])]

class DownBlock(Stack):
    """(B, c_in, H, W) -> (B, c_out, H/2, W/2), or with down=False (B, c_out, H, W)."""
    def __init__(self, c_in, c_out, layers, t_dim=None, heads=0, down=True):
        super().__init__(*res_blocks(c_in, c_out, layers, t_dim, heads))
        if down:
            self.append(nn.Conv2d(c_out, c_out, 3, stride=2, padding=1))

class MidBlock(Stack):
    """(B, c_in, h, w) -> (B, c_out, h, w): `layers` ResBlocks with attention, and one without."""
    def __init__(self, c_in, c_out, layers, t_dim=None, heads=4):
        super().__init__(*res_blocks(c_in, c_out, layers, t_dim, heads))
        self.append(ResBlock(c_out, c_out, t_dim))

class UpBlock(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, 2h, 2w), or with up=False (B, c_out, h, w). A skip of
    c_skip channels, as high and wide as the output, joins in before the ResBlocks."""
    def __init__(self, c_in, c_out, layers, t_dim=None, heads=0, up=True, c_skip=0):
        super().__init__()
        # nearest + conv: transposed convolutions would leave checkerboards
        conv = nn.Conv2d(c_in, c_in, 3, padding=1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), conv) if up else nn.Identity()
        self.blocks = Stack(*res_blocks(c_in + c_skip, c_out, layers, t_dim, heads))

    def forward(self, x, t_emb=None, skip=None):
        x = self.up(x)                                          # (B, c_in, 2h, 2w) if up
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.blocks(x, t_emb)


# ---- 2. Autoencoders: VQVAE and VAE differ only in what happens to the latent -------------------
# Both keep z easy to model in stage 2. VQVAE (van den Oord et al. 2017, arXiv 1711.00937): the
# decoder sees only K different vectors, and a commitment loss makes z_e gather around them; argmin
# has no gradient, hence the straight-through trick. VAE (Kingma & Welling 2013, arXiv 1312.6114):
# noise of a learned size is added to the mean, and a KL term keeps the mean small and the noise
# large (both only weakly here); z = mean + std eps, so that gradients reach both.

def build_encoder(channels, widths, layers, c_out):
    """Network: image (B, C, H, W) -> (B, c_out, h, w) with h = H / 2 ** (len(widths) - 1)."""
    c = widths[-1]
    return nn.Sequential(
        nn.Conv2d(channels, widths[0], 3, padding=1),
        *[DownBlock(a, b, layers) for a, b in zip(widths, widths[1:])],
        MidBlock(c, c, layers),
        norm_silu_conv(c, c_out),
        nn.Conv2d(c_out, c_out, 1))  # mixes and scales z, like VQGAN's quant_conv

def build_decoder(channels, widths, layers, z_channels):
    """Network: latent (B, D, h, w) -> image (B, C, H, W), the encoder mirrored."""
    widths = widths[::-1]
    c = widths[0]
    return nn.Sequential(
        nn.Conv2d(z_channels, z_channels, 1),
        nn.Conv2d(z_channels, c, 3, padding=1),
        MidBlock(c, c, layers),
        *[UpBlock(a, b, layers) for a, b in zip(widths, widths[1:])],
        norm_silu_conv(widths[-1], channels))  # no tanh: [-1, 1] is learnt, and callers clamp

class VQVAE(nn.Module):
    """Autoencoder that replaces each latent vector by the nearest of K codebook vectors.
    Call restart_codes(z_e) before the first step and every hundred steps."""
    def __init__(self, channels, widths, layers, z_channels, codebook_size):
        super().__init__()
        self.encoder = build_encoder(channels, widths, layers, z_channels)
        self.decoder = build_decoder(channels, widths, layers, z_channels)
        self.codebook = nn.Embedding(codebook_size, z_channels)  # (K, D)
        self.register_buffer("usage", torch.zeros(codebook_size))  # picks since the last restart

    def quantise(self, z_e):
        """z_e (B, D, h, w) -> z_q (B, D, h, w), nearest codes (Eq. 1-2), and indices (B, h, w)."""
        z = z_e.movedim(1, -1)                                  # (B, h, w, D)
        # cdist stays in float32 under autocast: bf16 would mistake one code in four (measured)
        dist = torch.cdist(z.flatten(0, 2), self.codebook.weight)  # (B*h*w, K)
        indices = dist.argmin(dim=1).view(z.shape[:3])          # (B, h, w)
        return self.codebook(indices).movedim(-1, 1), indices

    def forward(self, x):
        """x (B, C, H, W) in [-1, 1] -> reconstruction, {name: loss}: Eq. 3's last two, unweighted.
        Equal in value, but the codebook term moves the codes, the commit term moves z_e."""
        z_e = self.encode(x)
        z_q, indices = self.quantise(z_e)
        self.usage.index_add_(0, indices.flatten(), z_e.new_ones(indices.numel()))  # += 1
        codebook_loss = F.mse_loss(z_q, z_e.detach())
        commit_loss = F.mse_loss(z_e, z_q.detach())
        z_st = z_e + (z_q - z_e).detach()  # straight-through: value of z_q, gradient as from z_e
        return self.decoder(z_st).float(), {"codebook": codebook_loss, "commit": commit_loss}

    def encode(self, x):
        """The continuous z_e (B, D, h, w), which is what stage 2 models."""
        return self.encoder(x).float()  # under autocast it is bf16 or fp16

    def decode(self, z):
        """(B, D, h, w) -> (B, C, H, W). Quantises first: small errors of stage 2 are gone then."""
        z_q, _ = self.quantise(z)
        return self.decoder(z_q).float()

    @torch.no_grad()
    def restart_codes(self, z_e):
        """Codes that nothing picks get no gradient and stay dead. Moves all codes unpicked since
        the last call (on the first call: every code) onto random z_e."""
        z = z_e.movedim(1, -1).flatten(0, 2)                    # (B*h*w, D)
        new = z[torch.randint(len(z), (len(self.usage),), device=z.device)]
        new = new + 0.01 * z.std() * torch.randn_like(new)  # no two alike
        unused = self.usage == 0                                # (K,)
        self.codebook.weight[unused] = new[unused]
        self.usage.zero_()

class VAE(nn.Module):
    """Autoencoder whose latent values are Gaussians; a KL term pulls them, weakly, to N(0, 1)."""
    def __init__(self, channels, widths, layers, z_channels):
        super().__init__()
        self.encoder = build_encoder(channels, widths, layers, 2 * z_channels)  # mean and logvar
        self.decoder = build_decoder(channels, widths, layers, z_channels)
        # starts with little noise, else the first thousands of steps are spent on getting rid of it
        nn.init.constant_(self.encoder[-1].bias[z_channels:], -6.0)  # of logvar

    def forward(self, x):
        """x (B, C, H, W) in [-1, 1] -> reconstruction, {"kl": KL(q(z | x) || N(0, 1))}, appendix B:
        -1/2 sum(1 + logvar - mean^2 - exp(logvar)), / x.numel(), like the pixel loss."""
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)  # each (B, D, h, w)
        logvar = logvar.clamp(-30, 20)  # exp stays finite
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)  # reparameterised: Eq. 10
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum() / x.numel()
        return self.decoder(z).float(), {"kl": kl}

    def encode(self, x):
        """The mean of q(z | x), (B, D, h, w): q's std is tiny, so no draw is needed."""
        return self.encoder(x).float().chunk(2, dim=1)[0]

    def decode(self, z):
        return self.decoder(z).float()                          # (B, C, H, W)

def build_autoencoder(cfg):
    """What an AEConfig describes, with random weights."""
    args = (cfg.channels, cfg.widths, cfg.layers, cfg.z_channels)
    if cfg.ae == "vq":
        return VQVAE(*args, cfg.codebook_size)
    return VAE(*args)


# ---- 3. LPIPS: how different two images look (Zhang et al. 2018, arXiv 1801.03924) --------------
# Where z leaves details open, the least pixel error is their average (l2) or median (l1): blur. In
# a distance of features of an image classifier a blur is far away, so the decoder has to choose.

class LPIPS(nn.Module):
    """Distance of two images as people see it: the `lpips` package with net="vgg", v0.1. Frozen.
    weights: file of Eq. 1's learned w^2, (1, c, 1, 1), for five layers. vgg: `features.*` weights
    of a VGG16; None: torchvision's (ImageNet). Raises UserError if one of the two cannot be had."""
    def __init__(self, weights="lpips_weights.pth", vgg=None):
        super().__init__()
        try:
            lins = torch.load(weights, map_location="cpu", weights_only=True)
            self.lins = nn.ParameterList(lins[f"lin{i}.model.1.weight"] for i in range(5))
            vgg = vgg or models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(weights_only=True)
        except Exception as error:  # no such file, a damaged one, no internet
            raise UserError(f"LPIPS needs {weights}, and vgg16-397923af.pth of download.pytorch.org"
                            f"/models in {torch.hub.get_dir()}/checkpoints ({error!r})") from error
        net = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=False)  # VGG16
        net.load_state_dict({k[9:]: w for k, w in vgg.items() if k.startswith("features.")})
        cuts = (0, 4, 9, 16, 23, 30)  # slices end with relu1_2, 2_2, 3_3, 4_3, 5_3
        self.slices = nn.ModuleList(net[a:b] for a, b in zip(cuts, cuts[1:]))
        # ImageNet's mean and deviation per channel, for images in [-1, 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, x):
        """x (B, 1 or 3, H, W) in [-1, 1], at least 16x16 -> five feature maps."""
        h = (x - self.shift) / self.scale  # by broadcasting, grey becomes three channels
        maps = []
        for part in self.slices:
            h = part(h)  # c = 64, 128, 256, 512, 512; side H / 1, 2, 4, 8, 16
            maps.append(h.float())  # float32: squares overflow fp16
        return maps

    def forward(self, x, y):
        """x, y (B, 1 or 3, H, W) -> distances (B,), Eq. 1: the sum over layers of
        mean_hw sum_c w^2 (unit(f_x) - unit(f_y))^2. No gradient goes into y."""
        total = 0
        for lin, f_x, f_y in zip(self.lins, self.features(x), self.features(y.detach())):
            diff = F.normalize(f_x, dim=1) - F.normalize(f_y, dim=1)  # (B, c, h, w)
            total = total + (lin * diff.square()).sum(dim=1).mean(dim=(1, 2))
        return total


# ---- 4. PatchGAN: a critic of patches (Isola et al. 2017, arXiv 1611.07004) ---------------------
# The decoder also learns to fool it, which brings fine texture (VQGAN, see section 9).

class PatchGAN(nn.Module):
    """Images (B, C, H, W), at least 16x16 -> scores (B, 1, h', w'), one per patch; high is real."""
    def __init__(self, channels=3, c=64):
        super().__init__()
        self.net = nn.Sequential(  # 4, 2, 1: kernel, stride, padding, which halves H and W
            nn.Conv2d(channels, c, 4, 2, 1), nn.LeakyReLU(0.2),  # no norm here, says the paper
            nn.Conv2d(c, 2 * c, 4, 2, 1), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * c, 4 * c, 4, 2, 1), nn.BatchNorm2d(4 * c), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * c, 1, 4, 1, 2))  # stride 1: h' = H // 8 + 1; sees 46x46 (paper: 70x70)
        for layer in self.net:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)  # as in the paper

    def forward(self, x):
        return self.net(x).float()

def generator_loss(kind, fake):
    """What the autoencoder minimises, from the scores of its images. kind: bce, lsgan, hinge."""
    if kind == "hinge":
        return -fake.mean()
    if kind == "lsgan":
        return (fake - 1).square().mean()
    if kind == "bce":
        return F.softplus(-fake).mean()  # -log p, p = sigmoid(score)
    raise ValueError(f"no adversarial loss {kind!r}")

def discriminator_loss(kind, real, fake):
    """What the discriminator minimises, from scores of images, reconstructions; / 2 as in Isola."""
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    if kind == "lsgan":
        return ((real - 1).square().mean() + fake.square().mean()) / 2
    if kind == "bce":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    raise ValueError(f"no adversarial loss {kind!r}")


# ---- 5. Noise scheduler: how noise goes in, and three ways to take it out -----------------------
# DDPM: Ho et al. 2020, arXiv 2006.11239. DDIM: Song et al. 2020, 2010.02502. DPM-Solver++(2M): Lu
# et al. 2022, 2211.01095. A squared error is least for the mean of all eps that fit z_t. That mean
# is -sigma times the score, the gradient of log p(z_t): plain regression finds the direction in
# which the data lie. One jump from noise ends at the average image; after a step fewer fit z_t.

class NoiseScheduler(nn.Module):
    """z_t = alpha z0 + sigma eps. t = 0 .. T-1 are the papers' 1 .. T: t = 0 has one step of noise,
    T-1 is nearly all noise; z0 itself is t = -1, where samplers end. target: what the network
    predicts, eps, or v = alpha eps - sigma z0 (Salimans & Ho 2022, arXiv 2202.00512). Near t = T-1
    eps is almost z_t, a trivial task; v is almost -z0, a real one."""
    def __init__(self, T=1000, target="v"):
        super().__init__()
        self.T = T
        self.target = target
        # linear in sqrt(beta); LDM's range for CelebA-HQ, meant for T = 1000
        betas = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)        # (T,), abar
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)
        # as floats, for the samplers; index -1, the last entry, is t = -1, without noise
        self.abar = alphas_cumprod.tolist() + [1.0]
        self.lam = [0.5 * math.log(a / (1 - a)) for a in self.abar[:-1]] + [math.inf]

    def alpha_sigma(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t) of one step t, -1 .. T-1, as floats."""
        return math.sqrt(self.abar[t]), math.sqrt(1 - self.abar[t])

    def target_weights(self, alpha, sigma):
        """(w_z0, w_eps): the network predicts w_z0 z0 + w_eps eps."""
        return {"eps": (0, 1), "v": (-sigma, alpha)}[self.target]

    def add_noise(self, z0, eps, t):
        """z0, eps (B, D, h, w), t (B,) -> z_t, and what to predict; DDPM Eq. 4: any t in one go."""
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()  # z_t keeps the variance 1 of z0
        w_z0, w_eps = self.target_weights(alpha, sigma)
        return alpha * z0 + sigma * eps, w_z0 * z0 + w_eps * eps

    def z0_and_eps(self, pred, z_t, t):
        """The network's answer at step t (int), as estimates of z0 and eps: the two equations of
        add_noise, solved by Cramer's rule. z0 is not clamped: latents have no fixed range."""
        alpha, sigma = self.alpha_sigma(t)
        w_z0, w_eps = self.target_weights(alpha, sigma)
        det = alpha * w_eps - sigma * w_z0  # v: 1; eps: alpha (1/84 at T-1: errors grow 84-fold)
        return (w_eps * z_t - sigma * pred) / det, (alpha * pred - w_z0 * z_t) / det

    def timesteps(self, steps):
        """[(t, t_next), ...], evenly spaced from the noisiest step T-1 down to -1, clean."""
        t = np.linspace(self.T - 1, -1, steps + 1).round().astype(int).tolist()
        return list(zip(t, t[1:]))  # 30 steps: (999, 966), .., (32, -1)

    def ddpm_step(self, z0, z_t, t, t_next, noise):
        """Draws from q(z_next | z_t, z0), z0 the estimate: DDPM Eq. 6-7, for any t_next < t."""
        abar, abar_next = self.abar[t], self.abar[t_next]
        a = abar / abar_next  # DDPM's alpha_t = 1 - beta_t if t_next = t - 1
        z0_weight = math.sqrt(abar_next) * (1 - a) / (1 - abar)
        z_t_weight = math.sqrt(a) * (1 - abar_next) / (1 - abar)
        var = (1 - a) * (1 - abar_next) / (1 - abar)  # 0 in the last step
        return z0_weight * z0 + z_t_weight * z_t + math.sqrt(var) * noise

    def ddim_step(self, z0, eps, t_next):
        """The same z0 and eps, mixed with less noise: DDIM Eq. 12 with no new noise."""
        alpha, sigma = self.alpha_sigma(t_next)
        return alpha * z0 + sigma * eps

    def dpm_step(self, z0, z_t, t, t_next, previous=None):
        """DPM-Solver++(2M), Algorithm 2: DDIM, but with z0 extrapolated to the middle of the step,
        along lambda = log(alpha / sigma). previous: (t, z0) of the step before, if any."""
        if previous is not None and t_next >= 0:  # at t = -1 lambda is infinite: DDIM
            t_before, z0_before = previous
            width = self.lam[t_next] - self.lam[t]
            width_before = self.lam[t] - self.lam[t_before]
            z0 = z0 + (z0 - z0_before) / width_before * width / 2  # its slope, for half a step
        alpha, sigma = self.alpha_sigma(t)
        return self.ddim_step(z0, (z_t - alpha * z0) / sigma, t_next)  # eps that fits this z0


# ---- 6. UNet, and the latent diffusion model that ties sections 2, 5 and 6 together -------------
# The blocks of section 1, told the step t, with attention; a skip per block (DDPM: per layer).

class UNet(nn.Module):
    """z_t (B, D, h, w), t (B,) -> prediction (B, D, h, w). The first `downs` of its len(widths) - 1
    blocks halve h and w. The comments are for widths 192 256 384 512, downs 3, h = w = 32."""
    def __init__(self, z_channels, widths, downs, layers):
        super().__init__()
        c = widths[0]
        t_dim = 4 * c  # as in DDPM's code
        self.time = nn.Sequential(nn.Linear(c, t_dim), nn.SiLU(),
                                  nn.Linear(t_dim, t_dim), nn.SiLU())  # SiLU here, not per block
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        halvings = [i < downs for i in range(len(widths) - 1)]  # True True True
        self.down_blocks = nn.ModuleList()  # 192 -> 256 -> 384 -> 512
        for c_in, c_out, halve in zip(widths, widths[1:], halvings):
            self.down_blocks.append(DownBlock(c_in, c_out, layers, t_dim, heads=4, down=halve))
        self.mid = MidBlock(widths[-1], widths[-2], layers, t_dim)  # 512 -> 384
        self.up_blocks = nn.ModuleList()  # narrower than the way down: cheaper
        up_widths = [*widths[-2::-1], c]  # 384 256 192, as wide as the skips, and 192 again
        for c_in, c_out, double in zip(up_widths, up_widths[1:], halvings[::-1]):
            self.up_blocks.append(UpBlock(c_in, c_out, layers, t_dim, 4, up=double, c_skip=c_in))
        self.out = norm_silu_conv(c, z_channels)
        nn.init.zeros_(self.out[-1].weight)  # first answers near 0, loss near 1

    def forward(self, z_t, t):
        x = self.conv_in(z_t)                                   # (B, 192, 32, 32)
        t_emb = self.time(sinusoids(t, x.shape[1]))  # (B, 192) -> (B, t_dim)
        skips = []
        for block in self.down_blocks:
            skips.append(x)  # what goes into a down block comes back in its mirror image
            x = block(x, t_emb)  # (B, 256, 16, 16), (B, 384, 8, 8), (B, 512, 4, 4)
        x = self.mid(x, t_emb)                                  # (B, 384, 4, 4)
        for block in self.up_blocks:
            x = block(x, t_emb, skips.pop())  # (B, 256, 8, 8), (B, 192, 16, 16), (B, 192, 32, 32)
        return self.out(x).float()                              # (B, D, h, w)

class LatentDiffusion(nn.Module):
    """UNet, noise scheduler, autoencoder, mean and std of its latents. From LDMConfig and AEConfig.
    unet: the running average of the trained weights; guide: the same, frozen after a fifth of the
    steps: unet's errors, larger. `sample` steers away (autoguidance: Karras et al., 2406.02507)."""
    def __init__(self, cfg, ae_cfg, ae):
        super().__init__()
        D = ae_cfg.z_channels
        side = ae_cfg.size // 2 ** (len(ae_cfg.widths) - 1)
        # True as long as the halved side is whole and 4 or more, then False
        can_halve = [side % 2 ** i == 0 and side // 2 ** i >= 4 for i in range(1, len(cfg.widths))]
        self.shape = (D, side, side)
        self.ae = ae
        self.ae_cfg = ae_cfg
        self.unet = UNet(D, cfg.widths, sum(can_halve), cfg.layers)
        self.guide = copy.deepcopy(self.unet)
        self.scheduler = NoiseScheduler(target=cfg.target)
        self.register_buffer("mean", torch.zeros(1, D, 1, 1))
        self.register_buffer("std", torch.ones(1, D, 1, 1))

    def measure(self, z):
        """Sets mean and std, per channel, from latents z (N, D, h, w). The schedule is for variance
        1: larger variances show through at t = T-1, smaller ones drown early (LDM, app. G)."""
        self.std, self.mean = torch.std_mean(z.float(), (0, 2, 3), keepdim=True)
        self.std.clamp_(min=1e-6)  # a channel may be flat

    def normalise(self, z):
        """Latents (B, D, h, w) of the autoencoder -> z0, as the UNet sees them."""
        return (z.float() - self.mean) / self.std

    def decode(self, z0):
        """The way back, and to images (B, C, H, W) in [-1, 1]."""
        return self.ae.decode(z0 * self.std + self.mean).clamp(-1, 1)

    @torch.no_grad()
    def sample(self, n, seed, sampler="dpm", steps=30, batch=64, dtype=None, trace=None,
               guidance=1.5):
        """Noise -> `n` images (n, C, H, W) in [-1, 1], on the CPU. Image i has a noise generator of
        its own: but for rounding, the image does not depend on n or batch. `trace`, a list, gets
        (z_t, estimate of z0) of the first four. sampler: ddpm, ddim, dpm. guidance 1: none."""
        require(sampler in ("ddpm", "ddim", "dpm"), "sampler", sampler, "give ddpm, ddim or dpm")
        device = self.mean.device
        def draw_noise(generators):
            noise = [torch.randn(self.shape, generator=g) for g in generators]
            return torch.stack(noise).to(device)                # (batch, D, h, w)

        generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(n)]
        images = []
        for i in range(0, n, batch):
            own = generators[i:i + batch]
            z_t = draw_noise(own)
            previous = None
            with autocast(device, dtype):
                for t, t_next in self.scheduler.timesteps(steps):
                    t_now = torch.full((len(own),), t, device=device)
                    guide = self.guide(z_t, t_now)
                    pred = guide + guidance * (self.unet(z_t, t_now) - guide)
                    z0, eps = self.scheduler.z0_and_eps(pred, z_t, t)
                    if trace is not None and i == 0:
                        trace.append((z_t[:4].clone(), z0[:4].clone()))
                    if sampler == "ddpm":
                        z_t = self.scheduler.ddpm_step(z0, z_t, t, t_next, draw_noise(own))
                    elif sampler == "ddim":
                        z_t = self.scheduler.ddim_step(z0, eps, t_next)
                    else:
                        z_t = self.scheduler.dpm_step(z0, z_t, t, t_next, previous)
                    previous = (t, z0)
                images.append(self.decode(z_t).cpu())
        return torch.cat(images)


# ---- 7. Settings --------------------------------------------------------------------------------
# A dataclass per subcommand; the command line is made from its fields. The defaults are the recipe
# for 256x256 photos (celebhq, or your own folder); PRESETS says what differs for the small sets.

def flag(default, help, *choices, low=1, high=10 ** 9):
    """A setting: default, help, and what it may be: one of choices if given, else low .. high."""
    rule = dict(help=help, choices=choices or None, low=low, high=high)
    return field(default=default, metadata=rule)

@dataclass
class RunConfig:
    data: str = flag("toyfaces", "toyfaces, mnist (both have PRESETS), celebhq, or a folder")
    data_root: str = flag("data", "folder that holds the data sets and the image cache")
    out: str = flag(None, "run folder; if not given: runs/DATA")
    seed: int = flag(0, "seed of weights, batches and noise", low=0)
    amp: str = flag("auto", "auto: on CUDA bf16 or fp16", "auto", "bf16", "fp16", "off")

@dataclass
class TrainConfig(RunConfig):
    accum: int = flag(1, "batches whose gradients are averaged per optimiser step")
    flip: bool = flag(True, "also train on mirrored images", False, True)
    layers: int = flag(2, "ResNet layers per block")
    compile: bool = flag(True, "torch.compile on CUDA: slow start, then up to 2x", False, True)
    save_every: int = flag(1000, "steps between checkpoints, with pictures")

@dataclass
class AEConfig(TrainConfig):
    ae: str = flag("vq", "autoencoder: vq = VQVAE, kl = VAE", "vq", "kl")
    batch: int = flag(16, "images at once on the device", high=10 ** 5)
    steps: int = flag(9000, "optimiser steps in all")
    lr: float = flag(3e-4, "highest learning rate of Adam", low=1e-9)
    size: int = flag(256, "image side in pixels", low=16)
    channels: int = flag(3, "image channels: 3 colour, 1 grey", 1, 3)
    widths: tuple = flag((64, 64, 128, 256), "channels, image to latent, halving in between")
    z_channels: int = flag(4, "latent channels")
    codebook_size: int = flag(16384, "vectors in the codebook (vq)", high=10 ** 6)
    recon: str = flag("l1", "reconstruction loss", "l1", "l2")
    codebook_weight: float = flag(1.0, "weight of the codebook loss (vq)", low=0)
    commit_weight: float = flag(0.25, "weight of the commitment loss (vq)", low=0)
    kl_weight: float = flag(1e-6, "weight of the KL term per image value (kl)", low=0)
    perceptual_weight: float = flag(1.0, "weight of LPIPS; 0: off", low=0)
    gan_weight: float = flag(0.05, "highest weight of the GAN loss; 0: off", low=0)
    gan: str = flag("hinge", "adversarial loss", "bce", "lsgan", "hinge")
    disc_start: int = flag(2500, "steps before the GAN loss joins in", low=0)
    data_name: str = ""  # no flag: load_images notes here what it found

@dataclass
class LDMConfig(TrainConfig):
    batch: int = flag(128, "latents at once on the device", high=10 ** 5)
    steps: int = flag(10000, "optimiser steps in all")
    lr: float = flag(4e-4, "highest learning rate of Adam", low=1e-9)
    widths: tuple = flag((192, 256, 384, 512), "UNet channels, outside to inside")
    target: str = flag("v", "what the UNet predicts", "eps", "v")
    ae_settings: dict = field(default=None, repr=False)  # no flag: train_ldm notes here
    ae_fingerprint: str = ""  # which autoencoder made the latents

@dataclass
class SampleConfig(RunConfig):
    data: str = flag(None, "of which run; if not given: the newest under runs/")
    data_root: str = flag(None, "holds the data sets; if not given: as in training")
    n: int = flag(0, "images; 0: 16 for sample, 2000 for eval", low=0)
    batch: int = flag(64, "images at once on the device", high=10 ** 5)
    sampler: str = flag("dpm", "DDPM, DDIM, DPM-Solver++(2M)", "ddpm", "ddim", "dpm")
    steps: int = flag(30, "denoising steps; ddpm wants all 1000", high=1000)
    guidance: float = flag(1.5, "1: UNet alone; more: away from its early self", low=0, high=10)

PRESETS = {  # what differs from the above; too short to be worth compiling
    ("toyfaces", AEConfig): dict(  # l2: with l1, a median, lips vanish
        size=32, widths=(16, 32, 32), layers=1, z_channels=3, codebook_size=512, recon="l2",
        perceptual_weight=0.0, gan_weight=0.0, batch=8, steps=3000, lr=2e-3, compile=False),
    ("toyfaces", LDMConfig): dict(
        widths=(48, 64, 96), layers=1, batch=64, steps=1100, lr=2e-3, compile=False),
    ("mnist", AEConfig): dict(  # 28 can be halved twice, to 7
        size=28, channels=1, widths=(32, 64, 64), z_channels=3, codebook_size=256, flip=False,
        perceptual_weight=0.0, gan_weight=0.0, batch=128, steps=1000, lr=1e-3, compile=False),
    ("mnist", LDMConfig): dict(
        widths=(128, 128, 256), flip=False, batch=512, steps=2000, lr=2e-3, compile=False)}

class UserError(Exception):
    """A mistake that the user can repair: main() prints its sentence and exits with code 2."""

def require(fine, name, value, rule):
    """The one way to refuse a setting: UserError naming the flag, the value and the rule."""
    if not fine:
        raise UserError(f"--{name.replace('_', '-')} {value}: {rule}")

def resolve(cls, given):
    """The defaults, then the data set's preset, then what is given, checked. Raises UserError."""
    data = given.get("data", cls.data)
    cfg = cls(**PRESETS.get((data, cls), {}) | given)
    for f in [f for f in fields(cls) if f.metadata]:  # others are no flags
        value, rule = getattr(cfg, f.name), f.metadata
        if rule["choices"]:
            require(value in rule["choices"], f.name, value, f"give one of {rule['choices']}")
        elif f.type in (int, float):
            fine = type(value) in (int, f.type) and rule["low"] <= value <= rule["high"]
            require(fine, f.name, value, f"give {f.type.__name__}, {rule['low']} to {rule['high']}")
        else:
            require(value != "", f.name, "''", f"give {rule['help']}")
    if data and not cfg.out:
        cfg.out = str(Path("runs", Path(data).resolve().name))
    if issubclass(cls, TrainConfig):
        there = next(p for p in (Path(cfg.out), *Path(cfg.out).parents) if p.exists())
        require(there.is_dir() and os.access(there, os.W_OK), "out", there, "no folder to write to")
        require(Path(cfg.out) != Path(data), "out", cfg.out, "give another than --data")
        cfg.widths = tuple(cfg.widths)
        fine = len(cfg.widths) > 1 and all(c in range(4, 10000, 4) for c in cfg.widths)
        require(fine, "widths", cfg.widths, "give two or more multiples of 4 (heads)")
    if cls is AEConfig:
        require(cfg.size % 2 ** (len(cfg.widths) - 1) == 0, "size", cfg.size, "cannot be halved")
    return cfg

def pick_device(cfg):
    """The device, a GPU if there is one, and the dtype of autocast (None: plain float32)."""
    found = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if found else torch.device("cpu")
    amp = cfg.amp
    if amp == "auto" and device.type == "cuda":  # before Ampere bf16 is merely emulated, and slow
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)

def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype is not None)

def place(net, device):
    """On the device, channels last: what tensor cores want, but not MPS (pytorch#175189)."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return net.to(device, memory_format=layout)


# ---- 8. Training, what both stages share --------------------------------------------------------
# One skeleton: draw a batch, loss under autocast, backward, optimise; now and then log and save.

def learning_rate(cfg, step):
    """Rises for 500 steps or fewer, stays, and falls to 0 over the second half: Adam settles."""
    rise = step / min(500, 0.05 * cfg.steps)
    fall = (cfg.steps + 1 - step) / (0.5 * cfg.steps)
    return cfg.lr * min(1, rise, fall)

def optimise(scaler, optimiser, net, lr):
    """One step on the gradients at hand, their norm held below 1; then they are zeroed."""
    optimiser.param_groups[0]["lr"] = lr
    scaler.unscale_(optimiser)  # undoes fp16's scaling: clipping needs the norm
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    scaler.step(optimiser)  # with fp16: not if a gradient overflowed
    optimiser.zero_grad()

@torch.no_grad()
def update_ema(ema, model, step):
    """ema = decay ema + (1 - decay) model: an average over the last 200 steps or so, which jitters
    less than the weights; shorter at first, or the random start would stay in it for long."""
    decay = min(0.995, (1 + step) / (10 + step))
    # all weights in one go: a loop of lerp_ would add 8 % to a step of the UNet
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

class OnePassGroupNorm(nn.GroupNorm):
    """nn.GroupNorm with var = E[x^2] - E[x]^2, so that x is read once, and without its copy to
    NCHW. Compiled, a step of the UNet takes 20 % less time (H100, bf16)."""
    def forward(self, x):
        x = x.float()  # the difference of two large numbers: bf16 has no digits to spare
        split = (self.num_groups, -1)
        mean = x.mean((2, 3)).unflatten(1, split).mean(2, keepdim=True)  # (B, groups, 1)
        mean_square = x.square().mean((2, 3)).unflatten(1, split).mean(2, keepdim=True)
        var = (mean_square - mean.square()).clamp(min=0)  # rounding can bring it below
        scale = self.weight.view(split) * (var + self.eps).rsqrt()  # (B, groups, c / groups)
        shift = self.bias.view(split) - mean * scale
        return x * scale.flatten(1)[:, :, None, None] + shift.flatten(1)[:, :, None, None]

def compile_network(net, cfg, device):
    """In place, so that names in checkpoints stay. The first step then takes a minute or two."""
    if cfg.compile and device.type == "cuda":
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.__class__ = OnePassGroupNorm  # another forward, same weights
        # CUDA graphs launch all at once, but a replay overwrites the gradients that --accum adds up
        net.compile(dynamic=False, mode="reduce-overhead" if cfg.accum == 1 else "default")


# ---- 9. Stage 1: the autoencoder ----------------------------------------------------------------
# VQGAN, arXiv 2012.09841, section 3.1: reconstruction + LPIPS + latent terms + GAN, which joins in
# late; Adam's betas are from its code. Its GAN weight is adaptive. Ours rises over 1000 steps, for
# a new discriminator does harm; then it falls like the learning rate, or eyes fill up with grain.

LPIPS_WEIGHTS = Path(__file__).resolve().with_name("lpips_weights.pth")

def psnr(x_rec, x):
    """Peak signal-to-noise ratio (B,) in dB of images in [-1, 1]: 10 log10(peak^2 / MSE)."""
    mse = (x_rec - x).square().mean((1, 2, 3)).clamp(min=1e-10)
    return 10 * torch.log10(2 ** 2 / mse)

def codebook_use(picks):
    """Picks per code (K,) -> codes in use in percent, perplexity exp(-sum p log p), at most K."""
    p = picks / picks.sum().clamp(min=1)  # no picks yet: 0 / 1, not 0 / 0
    return 100 * (p > 0).float().mean(), torch.special.entr(p).sum().exp()  # entr(p) = -p log p

def draw_images(images, cfg, device):
    """A random batch (B, C, H, W) in [-1, 1], with cfg.flip each mirrored or not by chance."""
    x = images[torch.randint(len(images), (cfg.batch,))]
    if device.type == "cuda":  # pinned: copied while Python goes on, 7 % less time
        x = x.pin_memory().to(device, non_blocking=True)
    x = to_float(x, device)
    if cfg.flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
    return x

def train_ae(cfg):
    """Trains a VQVAE or VAE to cfg.steps and leaves <out>/ae.pt. Raises UserError."""
    device, dtype = pick_device(cfg)
    images, held = load_images(cfg)
    preview = to_float(held[:8], device)
    if cfg.perceptual_weight > 0:
        lpips = place(LPIPS(LPIPS_WEIGHTS), device)
        compile_network(lpips, cfg, device)
    weights = {"recon": 1.0, "codebook": cfg.codebook_weight, "commit": cfg.commit_weight,
               "kl": cfg.kl_weight, "perceptual": cfg.perceptual_weight}

    torch.manual_seed(cfg.seed)
    ae = place(build_autoencoder(cfg), device)
    disc = place(PatchGAN(cfg.channels), device)
    opt = torch.optim.Adam(ae.parameters(), betas=(0.5, 0.9), fused=True)  # lr: see optimise
    opt_d = torch.optim.Adam(disc.parameters(), betas=(0.5, 0.9), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # fp16 underflows
    run = Run(cfg, "ae", dict(net=ae, disc=disc, opt=opt, opt_d=opt_d, scaler=scaler))
    run.resume()
    compile_network(ae, cfg, device)

    for step in run.steps():  # up to cfg.steps; Ctrl-C saves, then stops
        torch.manual_seed(cfg.seed * 1_000_003 + step)  # resumed or not: same numbers
        lr = learning_rate(cfg, step)
        ramp = min(1, max(0, step - cfg.disc_start) / 1000)
        weights["gan"] = cfg.gan_weight * ramp * lr / cfg.lr  # rises, then falls with lr
        if cfg.ae == "vq" and step % 100 == 1:  # moves codes that the last 100 steps did not use
            with torch.no_grad(), autocast(device, dtype):
                ae.restart_codes(ae.encode(draw_images(images, cfg, device)))

        for _ in range(cfg.accum):  # gradients add up over these; one step follows
            x = draw_images(images, cfg, device)                # (B, C, H, W)

            # (1) autoencoder: minimise the weighted sum of its terms
            with autocast(device, dtype):
                x_rec, terms = ae(x)
                terms["recon"] = F.l1_loss(x_rec, x) if cfg.recon == "l1" else F.mse_loss(x_rec, x)
                if cfg.perceptual_weight > 0:
                    terms["perceptual"] = lpips(x_rec, x).mean()
                if weights["gan"] > 0:
                    disc.requires_grad_(False)  # gradients pass, none stay
                    terms["gan"] = generator_loss(cfg.gan, disc(x_rec))
                    disc.requires_grad_(True)  # for (2); the graph of (1) is made
                loss = sum(weights[name] * term for name, term in terms.items())
            scaler.scale(loss / cfg.accum).backward()  # / accum: the sum becomes a mean

            # (2) discriminator: tell images from reconstructions
            if weights["gan"] > 0:
                with autocast(device, dtype):
                    real, fake = disc(x), disc(x_rec.detach())  # (B, 1, h', w')
                    terms["disc"] = discriminator_loss(cfg.gan, real, fake)
                scaler.scale(terms["disc"] / cfg.accum).backward()
                terms |= {"score_real": real.mean(), "score_fake": fake.mean()}  # for the log
            run.add(terms)

        optimise(scaler, opt, ae, lr)
        if weights["gan"] > 0:
            optimise(scaler, opt_d, disc, lr)
        scaler.update()  # fp16: smaller after an overflow

        if run.due() or run.due(cfg.save_every):  # every 100 steps, and before saving
            with torch.no_grad(), autocast(device, dtype):
                z = ae.encode(preview)
                preview_rec = ae.decode(z).clamp(-1, 1)
            more = {"held_psnr": psnr(preview_rec, preview).mean(), "z_std": z.std()}
            if cfg.ae == "vq":
                more["codes_percent"], more["perplexity"] = codebook_use(ae.usage)
            run.log(**more)
        if run.due(cfg.save_every):  # picture rows: images, reconstructions, latents
            rows = [preview, preview_rec, latent_picture(z, cfg.size)]
            run.save(torch.cat([row.expand(-1, 3, -1, -1) for row in rows]), len(preview))


# ---- 10. Stage 2: diffusion on the latents ------------------------------------------------------
# The autoencoder is frozen, so each image is encoded once. The loss: DDPM Eq. 14, or that for v.

def load_autoencoder(path, device):
    """The autoencoder of a checkpoint ae.pt, frozen, and its settings. Raises UserError."""
    ckpt = load_file(path, "ae")
    cfg = AEConfig(**ckpt["config"])
    ae = build_autoencoder(cfg)
    ae.load_state_dict(ckpt["parts"]["net"])
    return place(ae, device).eval().requires_grad_(False), cfg

def load_latents(cfg, ae, images, device, dtype):
    """Latents of the images, with cfg.flip also of the mirrored ones: (N or 2N, D, h, w), float16.
    From <out>/latents.pt if these images and this autoencoder made it, else encoded now."""
    path = Path(cfg.out, "latents.pt")
    name = fingerprint(cfg.ae_fingerprint, cfg.flip, images.movedim(1, -1))  # NHWC: no copy
    saved = load_file(path, "latents") if path.exists() else {}
    if name not in saved:
        print(f"encoding {len(images)} images")
        latents = []
        for mirrored in ([False, True] if cfg.flip else [False]):
            for batch in images.split(16):  # few at once, as in stage 1
                x = to_float(batch, device)
                with autocast(device, dtype):
                    latents.append(ae.encode(x.flip(3) if mirrored else x).half())
        saved = {name: torch.cat(latents)}
        save_file(path, "latents", saved)
    return saved[name].to(device)

def train_ldm(cfg):
    """Trains a UNet on the latents to cfg.steps and leaves <out>/ldm.pt. Raises UserError."""
    device, dtype = pick_device(cfg)
    ae, ae_cfg = load_autoencoder(Path(cfg.out, "ae.pt"), device)
    images, _ = load_images(replace(ae_cfg, data=cfg.data, data_root=cfg.data_root))
    cfg.ae_fingerprint = fingerprint(*ae.state_dict().values())
    cfg.ae_settings = asdict(ae_cfg)
    torch.manual_seed(cfg.seed)
    ldm = place(LatentDiffusion(cfg, ae_cfg, ae), device).requires_grad_(False)
    unet = copy.deepcopy(ldm.unet).requires_grad_(True)  # the one trained; ldm.unet: its average
    opt = torch.optim.Adam(unet.parameters(), betas=(0.9, 0.99), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(cfg, "ldm", dict(net=unet, ldm=ldm, opt=opt, scaler=scaler))
    run.resume()
    z_all = load_latents(cfg, ldm.ae, images, device, dtype)    # (N, D, h, w)
    ldm.measure(z_all)
    print(f"latents {tuple(z_all.shape)}, mean {ldm.mean.flatten()}, std {ldm.std.flatten()}")
    compile_network(unet, cfg, device)

    for step in run.steps():  # up to cfg.steps; Ctrl-C saves, then stops
        torch.manual_seed(cfg.seed * 1_000_003 + step)  # resumed or not: same numbers
        for _ in range(cfg.accum):  # gradients add up over these
            z = z_all[torch.randint(len(z_all), (cfg.batch,), device=device)]
            z0 = ldm.normalise(z)                               # (B, D, h, w)
            t = torch.randint(ldm.scheduler.T, (cfg.batch,), device=device)
            z_t, target = ldm.scheduler.add_noise(z0, torch.randn_like(z0), t)
            with autocast(device, dtype):
                loss = F.mse_loss(unet(z_t, t), target)
            scaler.scale(loss / cfg.accum).backward()
            run.add({"loss": loss})

        optimise(scaler, opt, unet, learning_rate(cfg, step))
        scaler.update()
        update_ema(ldm.unet, unet, step)
        if step <= cfg.steps // 5:  # then it stays behind
            update_ema(ldm.guide, unet, step)

        if run.due() or run.due(cfg.save_every):  # every 100 steps, and before saving
            run.log()
        if run.due(cfg.save_every):
            run.save(ldm.sample(16, cfg.seed, dtype=dtype))


# ---- 11. Sampling and evaluation ----------------------------------------------------------------

def load_ldm(path, device):
    """The LatentDiffusion of a checkpoint ldm.pt, frozen. Raises UserError."""
    ckpt = load_file(Path(path), "ldm")
    cfg = LDMConfig(**ckpt["config"])
    ae_cfg = AEConfig(**cfg.ae_settings)
    ldm = LatentDiffusion(cfg, ae_cfg, build_autoencoder(ae_cfg))
    ldm.load_state_dict(ckpt["parts"]["ldm"])
    return place(ldm, device).eval().requires_grad_(False)

def find_checkpoint(cfg, *stages):
    """The newest checkpoint of these stages in --out, or under runs/. Raises UserError."""
    folders = [Path(cfg.out)] if cfg.out else Path("runs").glob("*")
    found = [path for f in folders for path in f.glob("*.pt") if path.stem in stages]
    require(found, "out", cfg.out or Path("runs").absolute(), "holds no such run: train first")
    return max(found, key=os.path.getmtime)

def sample(cfg):
    """Writes samples.png, and the denoising of four of them, progress.png, into the run folder."""
    device, dtype = pick_device(cfg)
    path = find_checkpoint(cfg, "ldm")
    ldm = load_ldm(path, device)
    n = cfg.n or 16
    trace = []
    images = ldm.sample(n, cfg.seed, cfg.sampler, cfg.steps, cfg.batch, dtype, trace, cfg.guidance)
    strip = denoising_strip(trace, ldm)
    save_picture(path.with_name("samples.png"), image_grid(images, math.ceil(math.sqrt(n))))
    save_picture(path.with_name("progress.png"), image_grid(strip, len(strip) // 8))
    print(f"wrote {path.with_name('samples.png').absolute()}")

def denoising_strip(trace, ldm):
    """Eight rows, noise to image: z_t of four samples, z_t decoded, the estimate of z0 decoded."""
    rows = []
    for k in np.linspace(0, len(trace) - 1, 8).round().astype(int):
        z_t, z0 = trace[k]                                      # (4, D, h, w)
        x_t, x0 = ldm.decode(z_t), ldm.decode(z0)               # (4, C, H, W)
        rows += [latent_picture(z_t, x_t.shape[-1]), x_t, x0]
    return torch.cat([row.expand(-1, 3, -1, -1) for row in rows])

def frechet_distance(a, b):
    """Between Gaussians fitted to features a, b (N, c), N > 1: |mu_a - mu_b|^2 + tr(S_a + S_b -
    2 (S_a S_b)^(1/2)); Heusel et al. 2017, arXiv 1706.08500."""
    a, b = a.double(), b.double()  # large sums almost cancel: float32 loses digits
    S_a, S_b = torch.cov(a.T), torch.cov(b.T)                   # (c, c)
    cross = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0).sqrt().sum()  # tr (S_a S_b)^(1/2)
    return (a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * cross

def evaluate(cfg):
    """Prints and returns {figure: value}, against images held out. Raises UserError."""
    device, dtype = pick_device(cfg)
    path = find_checkpoint(cfg, "ae", "ldm")
    ldm = load_ldm(path, device) if path.stem == "ldm" else None
    ae, ae_cfg = (ldm.ae, ldm.ae_cfg) if ldm else load_autoencoder(path, device)
    _, held = load_images(replace(ae_cfg, data=cfg.data or ae_cfg.data,
                                  data_root=cfg.data_root or ae_cfg.data_root))
    lpips = place(LPIPS(LPIPS_WEIGHTS), device)

    def features(x):  # (B, C, H, W) -> (B, 512): relu5_3, averaged over the positions
        return lpips.features(x.to(device))[-1].mean((2, 3)).cpu()

    rows = []
    for batch in held.split(32):
        x = to_float(batch, device)
        x_rec = ae.decode(ae.encode(x)).clamp(-1, 1)
        rows.append((psnr(x_rec, x), lpips(x_rec, x), features(x), features(x_rec)))
    psnrs, distances, real, rebuilt = map(torch.cat, zip(*rows))
    table = {"PSNR, dB": psnrs.mean(), "LPIPS": distances.mean(),
             "FD, reconstructions": frechet_distance(rebuilt, real)}
    if ldm:
        n = max(2, cfg.n or 2000)  # one has no covariance
        fake = ldm.sample(n, cfg.seed, cfg.sampler, cfg.steps, cfg.batch, dtype, None, cfg.guidance)
        fake = torch.cat([features(part) for part in fake.split(32)])
        table[f"FD, {n} samples ({cfg.sampler}, {cfg.steps} steps)"] = frechet_distance(fake, real)
    print(f"{path.absolute()}, {len(held)} held-out images; FD by VGG16, not Inception's FID")
    for name, value in table.items():
        print(f"  {name:42} {float(value):.4g}")
    return table


# ---- 12. Data: everything becomes one uint8 tensor (N, C, H, W) ---------------------------------
# Folders are decoded once, to squares, and cached; a part is held out from training for `eval`.

BACK = [(150, 205, 240), (250, 214, 150), (186, 230, 180), (240, 180, 190), (206, 190, 240)]
SKIN = [(255, 224, 196), (240, 200, 160), (214, 160, 118), (160, 108, 72), (110, 72, 48)]
HAIR = [(30, 26, 24), (104, 62, 32), (232, 196, 92), (190, 74, 36), (168, 168, 172), (84, 92, 200)]
MOUTHS = [(0.28, 0.2, 0, 180), (0.28, 0.2, 180, 360), (0.28, 0.06, 0, 360), (0.15, 0.15, 0, 360)]

def draw_face(index, size):
    """Toy face number `index`, uint8 (size, size, 3): drawn four times as large, then shrunk."""
    rng = np.random.default_rng(index)
    skin, hair, iris = SKIN[rng.integers(5)], HAIR[rng.integers(6)], HAIR[rng.integers(6)]
    x, y, rx, ry = rng.uniform((-0.08, 0.02, 0.48, 0.60), (0.08, 0.12, 0.60, 0.70))
    gap, eye = rng.uniform((0.22, 0.14), (0.28, 0.18))
    canvas = Image.new("RGB", (4 * size, 4 * size), BACK[rng.integers(5)])

    def ellipse(colour, x, y, rx, ry, start=0, end=360):
        """Unit: half a side; (0, 0) is the middle, y is down. start, end: degrees of an arc."""
        corners = np.array([x - rx, y - ry, x + rx, y + ry])
        ImageDraw.Draw(canvas).chord(((corners + 1) * 2 * size).tolist(), start, end, colour)

    if rng.random() < 0.5:  # long hair
        ellipse(hair, x, y + 0.15, rx + 0.22, ry + 0.25)
    ellipse(tuple(rng.integers(0, 200, 3).tolist()), 0, 1.25, 0.85, 0.5)  # shirt
    ellipse(skin, x, y, rx, ry)
    ellipse(hair, x, y, rx + 0.07, ry + 0.1, 205, 335)  # fringe
    for side in (-gap, gap):
        for part, colour in ((1, "white"), (0.6, iris), (0.3, "black")):
            ellipse(colour, x + side, y, part * eye, part * 0.8 * eye)
    ellipse((150, 40, 50), x, y + 0.38, *MOUTHS[rng.integers(4)])
    return np.array(canvas.resize((size, size), Image.Resampling.BOX))

def toyfaces(indices, size=32):
    """Cartoon faces (N, 3, size, size), uint8, N = len(indices). Index i is always one face."""
    faces = np.stack([draw_face(i, size) for i in indices])
    return torch.from_numpy(faces).permute(0, 3, 1, 2)

def decode_image(path, size, channels):
    """Any picture PIL reads -> uint8 array (size, size, channels): the centre square, upright.
    Transparency goes over white, 16 bits become 8. Raises what PIL raises on a broken file."""
    with Image.open(path) as img:
        if img.mode == "F" or (img.mode == "I" and img.format != "PNG"):
            raise ValueError(f"pixels of mode {img.mode} have no agreed range")
        img.draft(None, (2 * size, 2 * size))  # JPEG only: shrinks by 2, 4 or 8 while decoding
        img = ImageOps.exif_transpose(img)  # cameras store the turn as a tag
        if img.mode.startswith("I"):  # 16 bits
            values = np.asarray(img).clip(0, 65535) / 257
            img = Image.fromarray(values.round().astype(np.uint8))
        if img.has_transparency_data:
            white = Image.new("RGBA", img.size, "white")
            img = Image.alpha_composite(white, img.convert("RGBA"))
        img = img.convert("L" if channels == 1 else "RGB")
        img = ImageOps.fit(img, (size, size), Image.Resampling.LANCZOS)
        return np.array(img).reshape(size, size, channels)

@contextlib.contextmanager
def new_file(path):
    """A file to write under a temporary name, renamed at the end: it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

def fingerprint(*things):
    """A name for tensors and plain values: equal ones, equal name."""
    digest = hashlib.sha256()
    for x in things:
        digest.update(x.cpu().contiguous().numpy() if torch.is_tensor(x) else repr(x).encode())
    return digest.hexdigest()[:12]

def load_folder(folder, size, channels, cache_folder):
    """uint8 (N, channels, size, size), shuffled, and a name for this list of files. Decodes once,
    into a cache. Prints and skips unreadable pictures; UserError if fewer than three are left."""
    names = sorted(glob.glob("**/*", root_dir=folder, recursive=True))
    runs = {Path(name).parent for name in names if Path(name).name in ("ae.pt", "ldm.pt")}
    names = [name for name in names if Path(name).suffix.lower() in Image.registered_extensions()
             and runs.isdisjoint(Path(name).parents)  # what a run has written is no data
             and (folder / name).is_file()]
    names = sorted({os.path.realpath(folder / name): name for name in names}.values())  # links
    require(len(names) > 2, "data", folder, f"has {len(names)} pictures (but those of runs)")
    stats = [(folder / name).stat() for name in names]
    data_name = f"{len(names)} files, {fingerprint(names, [s.st_size for s in stats])}"
    version = fingerprint(data_name, [s.st_mtime for s in stats])
    cache = cache_folder / f"{version}-{size}x{size}x{channels}.uint8"
    def decode(name):
        try:
            return decode_image(folder / name, size, channels).tobytes()
        except Exception as error:  # PIL raises many
            print(f"skipped, unreadable: {folder / name} ({error})")
            return b""

    if not cache.exists():
        print(f"decoding {len(names)} pictures of {folder}, once")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
        with new_file(cache) as file, ThreadPoolExecutor(4) as pool:
            file.writelines(pool.map(decode, [names[i] for i in order]))
            require(file.tell() > 2 * size * size * channels, "data", folder, "3 must be readable")
    images = torch.from_file(str(cache), size=cache.stat().st_size, dtype=torch.uint8)  # on demand
    images = images.view(-1, size, size, channels).permute(0, 3, 1, 2)  # (N, C, H, W)
    print(f"{folder}: {len(images)} pictures, {len(names) - len(images)} more are unreadable")
    return images, data_name

def load_images(cfg):
    """(training images, held-out images), uint8; held out is a tenth, 2 to 1000. Makes paths in
    cfg absolute, notes cfg.data_name; UserError if another is noted: the two parts would mix."""
    root = Path(cfg.data_root).absolute()
    cfg.data_root = str(root)  # so that `eval` finds it from any folder
    data_name = cfg.data  # for a built-in set
    if cfg.data == "toyfaces":
        images = toyfaces(range(10000), cfg.size)
    elif cfg.data == "mnist":
        try:
            digits = datasets.MNIST(root, download=True).data  # the test set stays unseen
        except Exception as error:  # no internet, or broken files
            raise UserError(f"mnist: put its 4 files into {root}/MNIST/raw ({error})") from error
        images = TF.resize(digits[:, None], [cfg.size, cfg.size])
    else:
        folder = root / "celebhq" if cfg.data == "celebhq" else Path(cfg.data).absolute()
        cfg.data = cfg.data if cfg.data == "celebhq" else str(folder)
        require(folder.is_dir(), "data", cfg.data, f"{folder} is no folder of pictures")
        images, data_name = load_folder(folder, cfg.size, cfg.channels, root / "cache")
    require(images.shape[1] == cfg.channels, "channels", cfg.channels, f"{cfg.data} has others")
    require(cfg.data_name in ("", data_name), "data", cfg.data, f"{data_name}, but the run was "
            f"trained on {cfg.data_name}: give that again, or another --out")
    cfg.data_name = data_name
    held = min(1000, max(2, len(images) // 10))  # load_folder has shuffled
    return images[:-held], images[-held:]

def to_float(images, device):
    """uint8 (B, C, H, W) -> float in [-1, 1] on the device."""
    return images.to(device).float() / 127.5 - 1


# ---- 13. Runs: a folder with checkpoints, a log, curves and pictures ----------------------------
# A stopped run goes on with the same command: batches and noise depend on seed and step alone.
# What may differ then (data: the path, not its files; steps moves learning rate and guide's end):
MAY_CHANGE = ["out", "data", "data_root", "steps", "amp", "compile", "save_every"]

def save_file(path, kind, content):
    buffer = io.BytesIO()  # torch.save to a file turns a full disk into a riddle
    torch.save({f"{kind} of ldm.py 6": content}, buffer)
    with new_file(path) as file:
        file.write(buffer.getbuffer())

def save_picture(path, picture):
    with new_file(path) as file:
        picture.save(file, "PNG")

def load_file(path, kind):
    """What save_file wrote. Raises UserError if it is missing, damaged or something else."""
    try:  # weights_only: executes nothing
        return torch.load(path, map_location="cpu", weights_only=True)[f"{kind} of ldm.py 6"]
    except Exception as error:  # whatever disks, zip files and unpicklers raise
        message = f"{path.absolute()} is missing, damaged or outdated: train first, or delete it"
        raise UserError(f"{message} ({error!r:.90})") from error

class Run:
    """A training stage in its run folder: resumes, counts steps, logs, saves. parts: {name: module,
    optimiser or scaler}, what the checkpoint holds besides settings and log; "net" is trained."""
    stopping = None  # None: no loop is at work, False: one is, True: it shall end (on_signal)

    def __init__(self, cfg, stage, parts):
        self.cfg = cfg
        self.stage = stage
        self.parts = parts
        self.path = Path(cfg.out, f"{stage}.pt")
        self.step = 0  # how many are done
        self.rows = []  # of the log, {name: value}
        self.terms = {}  # {name: values since the last row}

    def resume(self):
        """Goes on after the checkpoint, if there is one. UserError if its settings were others."""
        print(f"train-{self.stage}: {self.cfg}")
        if self.path.exists():
            ckpt = load_file(self.path, self.stage)
            for name, now in reversed(asdict(self.cfg).items()):  # backwards: the cause first
                then = ckpt["config"][name]
                if name not in MAY_CHANGE and then != now:
                    raise UserError(f"{self.path} was trained with {name} = {then}, not {now}; "
                                    "another --out starts anew")
            for name, state in ckpt["parts"].items():
                if state:  # a scaler that was off has none
                    self.parts[name].load_state_dict(state)
            self.step = ckpt["step"]
            self.rows = ckpt["log"]
            print(f"going on after step {self.step}; --steps was {ckpt['config']['steps']}")

    def steps(self):
        """Yields the steps still to do, up to cfg.steps. After a stop (on_signal) one more is done,
        for which `due` is True, so that it is saved; then KeyboardInterrupt."""
        Run.stopping = False
        self.last = self.step >= self.cfg.steps
        self.start = time.perf_counter()
        while not self.last:
            self.step += 1
            self.last = Run.stopping or self.step == self.cfg.steps
            yield self.step
        stopped = Run.stopping
        Run.stopping = None
        print(f"step {self.step} of {self.cfg.steps} is saved: {self.path.absolute()}")
        if stopped:
            raise KeyboardInterrupt  # main() makes exit code 130 of it

    def due(self, every=100):
        """Whether an interval ends with this step; the last step ends all."""
        return self.step % every == 0 or self.last

    def add(self, terms):
        """Keeps loss terms on the device: reading them in each step would make it wait."""
        for name, value in terms.items():  # clone: a CUDA graph's replay overwrites its outputs
            self.terms.setdefault(name, []).append(value.detach().clone())

    def log(self, **more):
        """A line on the screen and a row of the log. UserError, before a save, if not finite."""
        more["weight_norm"] = nn.utils.get_total_norm(self.parts["net"].parameters())
        means = {name: torch.stack(values).mean() for name, values in self.terms.items()}
        row = {name: float(value) for name, value in (means | more).items()}
        if not all(map(math.isfinite, row.values())):
            raise UserError(f"not finite at step {self.step}, which is not saved: {row}. --amp off "
                            "goes on from the last save; a lower --lr needs a new --out")

        pace = max(map(len, self.terms.values())) / (time.perf_counter() - self.start)  # batches/s
        left = (self.cfg.steps - self.step) * self.cfg.accum / pace / 60
        print(f"{self.stage} {self.step}/{self.cfg.steps}  {pace * self.cfg.batch:.0f}/s, "
              f"{left:.1f} minutes left ", *[f"{k} {v:.4g}" for k, v in row.items()], flush=True)
        self.rows.append({"step": self.step} | row)
        self.terms = {}
        self.start = time.perf_counter()

    def save(self, images, columns=8):
        """Writes the checkpoint, a picture of images (N, C, H, W), and the curves."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save_file(self.path, self.stage, dict(step=self.step, config=asdict(self.cfg),
                                              log=self.rows, parts=parts))
        name = f"{self.stage}-{self.step:06d}.png"
        save_picture(self.path.with_name("pictures") / name, image_grid(images, columns))
        save_picture(self.path.with_name(f"{self.stage}-curves.png"), draw_curves(self.rows))
        self.start = time.perf_counter()  # saving is not training time

def draw_curves(rows):
    """A panel for each figure of the log, over the steps: a PIL picture."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")  # in order
    image = Image.new("RGB", (800, 70 * len(names)), "white")
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        steps, values = np.array([(row["step"], row[name]) for row in rows if name in row]).T
        low, high = values.min(), values.max()
        x = 800 * steps / steps.max()
        y = 70 * i + 18 + 48 * (high - values) / max(high - low, 1e-12)
        draw.line(list(zip(x, y)), fill="#1f5fbf", width=2)
        draw.text((5, 70 * i + 3), f"{name} {low:.4g} .. {high:.4g}, now {values[-1]:.4g}", 0)
    return image

def image_grid(images, columns):
    """Images (N, 1 or 3, H, W) in [-1, 1] -> one PIL picture; tiny ones are enlarged."""
    images = F.interpolate(images.float().cpu(), scale_factor=max(1, 96 // images.shape[-1]))
    grid = utils.make_grid(images.clamp(-1, 1), columns, pad_value=-1)
    return TF.to_pil_image(((grid + 1) * 127.5).round().byte())

def latent_picture(z, size):
    """Latents (N, D, h, w) as images (N, 3, size, size): three channels as colours, or one grey."""
    z = z[:, :3] if z.shape[1] >= 3 else z[:, :1].expand(-1, 3, -1, -1)
    z = (z - z.mean((0, 2, 3), keepdim=True)) / (3 * z.std((0, 2, 3), keepdim=True) + 1e-6)
    return F.interpolate(z, size=(size, size))


# ---- 14. Command line ---------------------------------------------------------------------------

def demo(cfg):
    """Both stages and samples, by default on toy faces at a tiny size; these need no download."""
    train_ae(resolve(AEConfig, asdict(cfg)))
    train_ldm(resolve(LDMConfig, asdict(cfg)))
    sample(resolve(SampleConfig, asdict(cfg) | {"n": 64}))

COMMANDS = {  # name: (settings, function, help)
    "train-ae": (AEConfig, train_ae, "stage 1: train the autoencoder"),
    "train-ldm": (LDMConfig, train_ldm, "stage 2: train the diffusion model on its latents"),
    "sample": (SampleConfig, sample, "make new images"),
    "eval": (SampleConfig, evaluate, "measure the autoencoder and the samples on held-out images"),
    "demo": (RunConfig, demo, "both stages and samples in a few minutes")}

def build_parser():
    """A subcommand per entry of COMMANDS, a flag per field of its settings."""
    parser = argparse.ArgumentParser(prog="ldm.py", description="latent diffusion in one file")
    subparsers = parser.add_subparsers(dest="command", required=True)
    special = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"type": int, "nargs": "+"}}
    for command, (cls, _, help) in COMMANDS.items():
        sub = subparsers.add_parser(command, help=help, argument_default=argparse.SUPPRESS)
        for f in [f for f in fields(cls) if f.metadata]:
            kind = special.get(f.type, {"type": f.type, "choices": f.metadata["choices"]})
            help = f"{f.metadata['help']} (default: {f.default})"
            sub.add_argument("--" + f.name.replace("_", "-"), help=help, **kind)
    return parser

def on_signal(*_):
    """Training saves and ends a step later; anything else, or a second signal, ends at once."""
    if Run.stopping is not False:
        raise KeyboardInterrupt
    Run.stopping = True

def main(argv=None):
    """Runs a command line; returns the exit code: 0 done, 2 an error, 130 stopped by a signal."""
    for s in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(s) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(s, on_signal)
    given = vars(build_parser().parse_args(argv))  # only what was typed: SUPPRESS
    cls, function, _ = COMMANDS[given.pop("command")]
    try:
        function(resolve(cls, given))
        return 0
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:  # OSError: a full disk
        message = error
    except (MemoryError, torch.OutOfMemoryError):
        message = "out of memory: lower --batch (a run that has a checkpoint needs a new --out)"
    print(f"ldm.py: error: {message}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    sys.exit(main())
