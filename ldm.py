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
  python ldm.py eval                      # PSNR, LPIPS, codebook usage, Frechet distance
Letters, the same in code and tests, mostly those of the papers:
  B batch   C image channels   H W image height, width   D latent channels   h w latent size
  K codebook size   T diffusion steps   x image in [-1, 1]   z latent   eps Gaussian noise
  z_e, z_q latent before, after quantising   z0 clean, z_t noisy latent   t step, 0 .. T-1
  N images   c channels inside a network   abar product of 1 - beta   sg[.] stops the gradient
The table of contents: grep "^# ----" ldm.py
"""
import argparse, contextlib, copy, csv, hashlib, importlib.util, io, itertools, math, os
import signal, sys, time, warnings, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision import datasets, models, utils
from torchvision.transforms import functional as TF

# ---- 1. Settings: every default, its range and its help ----------------------------------------
# A dataclass per subcommand; the command line is made from its fields. The defaults are the
# recipe for 256x256 photos (celebhq, or your own folder); toyfaces=, mnist= say what differs there.
class UserError(Exception):
    """A mistake that the user can repair: main() prints its sentence and exits with code 2."""
def flag(default, help, choices=None, lo=None, hi=math.inf, **presets):
    """A setting: its help, its choices or its range lo .. hi, the defaults of other data sets."""
    return field(default=default, metadata=dict(help=help, choices=choices, lo=lo, hi=hi,
                                                presets=presets))
@dataclass
class RunConfig:
    data: str = flag("toyfaces", "toyfaces, mnist, celebhq, or the path of a folder of images")
    data_root: str = flag("data", "folder that holds the data sets and the image cache")
    out: str = flag("", "run folder; empty: runs/DATA")
    seed: int = flag(0, "seed of weights, batches and noise", lo=0, hi=10 ** 9)
    device: str = flag("auto", "auto: cuda, else mps, else cpu", ("auto", "cuda", "mps", "cpu"))
    amp: str = flag("auto", "auto: with CUDA bf16, or fp16", ("auto", "bf16", "fp16", "off"))
@dataclass
class TrainConfig(RunConfig):
    accum: int = flag(1, "batches whose gradients are averaged per optimiser step", lo=1)
    warmup: int = flag(500, "steps in which the learning rate rises", lo=0, toyfaces=50, mnist=100)
    flip: bool = flag(True, "also train on mirrored images", mnist=False)
    layers: int = flag(2, "ResNet layers per block", lo=1, toyfaces=1)
    compile: bool = flag(None, "torch.compile; None: with CUDA", toyfaces=False, mnist=False)
    ema: float = flag(0.9999, "decay of the weight average, which is what is used", lo=0, hi=1)
    log_every: int = flag(100, "steps between log lines", lo=1)
    save_every: int = flag(1000, "steps between checkpoints, with pictures", lo=1, toyfaces=500)
@dataclass
class AEConfig(TrainConfig):
    ae: str = flag("vq", "autoencoder: vq = VQVAE, kl = VAE", ("vq", "kl"))
    batch: int = flag(16, "images at once on the device", lo=1, toyfaces=8, mnist=128)
    steps: int = flag(9000, "optimiser steps in all", lo=1, toyfaces=3000, mnist=1000)
    lr: float = flag(3e-4, "learning rate of Adam", lo=1e-12, toyfaces=2e-3, mnist=1e-3)
    size: int = flag(256, "image side in pixels", lo=8, toyfaces=32, mnist=28)
    channels: int = flag(3, "image channels: 3 colour, 1 grey", (1, 3), mnist=1)
    widths: tuple = flag((64, 64, 128, 256), "channels from image to latent, halving in between",
                         toyfaces=(16, 32, 32), mnist=(32, 64, 64))  # mnist: 28 halves twice, to 7
    z_channels: int = flag(4, "latent channels", lo=1, toyfaces=3, mnist=3)
    codebook_size: int = flag(8192, "vectors in the codebook (vq)", lo=2, toyfaces=512, mnist=256)
    recon: str = flag("l1", "reconstruction loss", ("l1", "l2"), toyfaces="l2")  # l1 loses lips
    recon_weight: float = flag(1.0, "weight of the reconstruction loss", lo=0)
    codebook_weight: float = flag(1.0, "weight of the codebook loss (vq)", lo=0)
    commit_weight: float = flag(0.25, "weight of the commitment loss (vq)", lo=0)  # VQVAE's beta
    kl_weight: float = flag(1e-6, "weight of the KL divergence per image value (kl)", lo=0)
    perceptual_weight: float = flag(1.0, "weight of LPIPS; 0: off", lo=0, toyfaces=0.0, mnist=0.0)
    gan_weight: float = flag(0.05, "weight of the GAN loss; 0: off", lo=0, toyfaces=0.0, mnist=0.0)
    gan: str = flag("hinge", "adversarial loss", ("bce", "lsgan", "hinge"))
    disc_start: int = flag(2500, "step from which the adversarial loss trains", lo=0)
    ema: float = flag(0.995, "decay of the weight average, which is what is used", lo=0, hi=1)
@dataclass
class LDMConfig(TrainConfig):
    batch: int = flag(128, "latents at once on the device", lo=1, toyfaces=64, mnist=512)
    steps: int = flag(10000, "optimiser steps in all", lo=1, toyfaces=1100, mnist=2000)
    lr: float = flag(2e-4, "learning rate of Adam", lo=1e-12, toyfaces=2e-3, mnist=2e-3)
    space: str = flag("latent", "diffuse latents, or pixels as in DDPM", ("latent", "pixel"))
    size: int = flag(0, "image side in pixels; 0: the autoencoder's or the data set's", lo=0)
    widths: tuple = flag((192, 256, 384, 512), "UNet channels; a block between two neighbours",
                         toyfaces=(48, 64, 96), mnist=(128, 128, 256))
    downs: int = flag(3, "how many of the blocks halve the resolution", lo=0, toyfaces=1, mnist=0)
    target: str = flag("v", "what the UNet predicts", ("eps", "v"))
    schedule: str = flag("linear", "noise: linear in sqrt(beta), or cosine", ("linear", "cosine"))
@dataclass
class SampleConfig(RunConfig):
    data: str = flag("", "data set whose run is taken; empty: the newest run under runs/")
    data_root: str = flag("", "folder that holds the data sets; empty: as in training")
    n: int = flag(0, "images; 0: 16 for sample, 2000 for eval", lo=0)
    batch: int = flag(64, "images at once on the device", lo=1)
    sampler: str = flag("dpm", "ancestral DDPM, DDIM, DPM-Solver++(2M)", ("ddpm", "ddim", "dpm"))
    steps: int = flag(30, "denoising steps", lo=1, hi=1000)  # enough for dpm; ddpm wants 1000
    save_images: bool = flag(False, "also write each image as a PNG")
    progress: bool = flag(False, "also write the denoising as a strip and a GIF")

def defaults(cls, data):
    """The settings of a command for a data set, {name: value}."""
    return {f.name: f.metadata["presets"].get(data, f.default) for f in fields(cls)}
def require(fine, name, value, rule):
    """The one way to refuse a setting: UserError naming the flag, the value and the rule."""
    if not fine:
        raise UserError(f"--{name.replace('_', '-')} {value}: {rule}")
def resolve(cls, given):
    """The data set's defaults, then what is given, checked: a settings object. Raises UserError."""
    cfg = cls(**defaults(cls, given.get("data", cls.data)) | given)  # what is given wins
    cfg.out = cfg.out or (cfg.data and str(Path("runs", Path(cfg.data).resolve().name)))
    for f in fields(cls):
        value, lo, hi = getattr(cfg, f.name), f.metadata["lo"], f.metadata["hi"]
        require(lo is None or (lo <= value <= hi and value < math.inf), f.name, value,
                f"must be {lo} or more" + f" and at most {hi}" * (hi < math.inf))  # False: no text
    if issubclass(cls, TrainConfig):
        cfg.widths, halvings = tuple(cfg.widths), len(cfg.widths) - 1
        require(halvings > 0 and all(c > 0 and c % 4 == 0 for c in cfg.widths), "widths",
                cfg.widths, "give two or more multiples of 4, the number of attention heads")
    if cls is LDMConfig:
        require(cfg.downs <= halvings, "downs", cfg.downs, f"--widths gives only {halvings} blocks")
        require(cfg.target == "v" or cfg.schedule == "linear", "target", cfg.target, "z0 would be "
                "divided by almost 0 at the noisy end of --schedule cosine; take --target v")
    if cls is AEConfig:
        unit = max(8, 2 ** halvings)
        require(cfg.size % 2 ** halvings == 0, "size", cfg.size, f"--widths halves it {halvings} "
                f"times, so give a multiple of {unit}, like {max(1, cfg.size // unit) * unit}")
        require(cfg.batch > 1 or cfg.size >= 16 or not cfg.gan_weight, "batch", cfg.batch,
                "batch norm cannot take one value: give 2, or --size 16, or --gan-weight 0")
        if cfg.gan_weight and cfg.disc_start >= cfg.steps:  # the default is, in a short trial
            require("disc_start" not in given, "disc_start", cfg.disc_start,
                    f"is past --steps {cfg.steps}; --gan-weight 0 trains without")
            print(f"note: --disc-start {cfg.disc_start} is past the end, no adversarial loss")
    return cfg

def pick_device(cfg):
    """The device, and the dtype of autocast (None: plain float32). Raises UserError."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = cfg.device if cfg.device != "auto" else next(d for d in here if here[d])
    require(here[name], "device", name, "this machine or this PyTorch has none; try --device auto")
    if (amp := cfg.amp) == "auto" and name == "cuda":  # a T4 (7.5) merely emulates bf16, and slowly
        amp = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    require(amp != "fp16" or name != "cpu", "amp", amp, "needs a GPU; on a CPU use --amp off")
    return torch.device(name), {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
def autocast(device, dtype):  # a CUDA graph cannot hold its cache of converted weights
    return torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False)
def layout(device):  # tensor cores want channels_last; on MPS BatchNorm fails then (pytorch#175189)
    return torch.contiguous_format if device.type == "mps" else torch.channels_last

# ---- 2. Data: everything becomes one uint8 tensor (N, C, H, W) ----------------------------------
# Decoded once, cropped to a square, cached; a part is held out from training for `eval`.
CELEBHQ = ("celebhq", "celeba_hq", "celeba-hq", "CelebA-HQ", "CelebAMask-HQ/CelebA-HQ-img",
           "celeba_hq_256", "celebahq-resized-256x256", "celebahq", "CelebA-HQ-img", "data256x256")
BACK = (150, 205, 240), (250, 214, 150), (186, 230, 180), (240, 180, 190), (206, 190, 240)
SKIN = (255, 224, 196), (240, 200, 160), (214, 160, 118), (160, 108, 72), (110, 72, 48)
HAIR = (30, 26, 24), (104, 62, 32), (232, 196, 92), (190, 74, 36), (168, 168, 172), (84, 92, 200)

def toyfaces(indices, size=32):
    """Cartoon faces (N, 3, S, S), uint8, N = len(indices), S = size. Index i is always one face.
    Background, skin, hair (6 colours, short or long), eyes, mouth, shirt and head shape vary."""
    u = torch.stack([torch.rand(16, generator=torch.Generator().manual_seed(i)) for i in indices])
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) * 2 / size - 1] * 2, indexing="ij")  # (S, S)
    colour = lambda k, table: torch.tensor(table).float()[(u[:, k] * len(table)).long()]   # (N, 3)
    between = lambda k, lo, hi: (lo + (hi - lo) * u[:, k])[:, None, None]               # (N, 1, 1)
    ellipse = lambda cx, cy, rx, ry: ((((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2).sqrt() - 1) * ry
    skin, hair, iris = colour(1, SKIN), colour(2, HAIR), colour(3, HAIR)
    cx, cy = between(4, -0.08, 0.08), between(5, 0.02, 0.12)  # head; unit: half a side, y is down
    rx, ry = between(6, 0.48, 0.60), between(7, 0.60, 0.70)
    img = colour(0, BACK)[:, :, None, None].expand(-1, -1, size, size)               # (N, 3, S, S)
    def paint(distance, colour):  # signed distance: below 0 is inside; the rim is antialiased
        nonlocal img
        cover = (0.5 - distance * size / 2).clamp(0, 1).reshape(-1, 1, size, size)  # rim: one pixel
        img = img + cover * (torch.as_tensor(colour).float().reshape(-1, 3, 1, 1) - img)
    paint(ellipse(cx, cy + 0.15, rx + 0.22, ry + 0.25) + (u[:, 8, None, None] < 0.5), hair)  # long?
    paint(ellipse(0, 1.25, 0.85, 0.5), 200 * u[:, 9:12])                                # shirt
    paint(ellipse(cx, cy, rx, ry), skin)
    fringe = y - cy + between(12, 0.22, 0.36) + 0.35 * (x - cx) ** 2  # below 0: above the hairline
    paint(torch.maximum(ellipse(cx, cy, rx + 0.07, ry + 0.1), fringe), hair)
    gap, eye, mood = between(13, 0.22, 0.28), between(14, 0.14, 0.18), between(15, 0, 4).long()
    for side, (scale, shade) in itertools.product(
            (-gap, gap), ((1, (255, 255, 255)), (0.6, iris), (0.3, (25, 20, 20)))):
        paint(ellipse(cx + side, cy, eye * scale, eye * scale * 0.8), shade)
    paint(ellipse(cx, cy + 0.2, 0.06, 0.08), skin * 0.8)                                # nose
    bend = 1.6 * (1 - mood.clamp(max=2))               # mood 0: smile, 1: straight, 2: sad, 3: open
    lips = (y - cy - 0.42 - bend * (0.03 - (x - cx) ** 2)).abs() - 0.05
    lips = torch.maximum(lips, (x - cx).abs() - 0.27)  # maximum: inside both, so it has ends
    paint(torch.where(mood == 3, ellipse(cx, cy + 0.42, 0.16, 0.14), lips), (150, 40, 50))
    return img.round().to(torch.uint8)

def decode_image(path, size, channels):
    """Any picture PIL reads -> uint8 array (size, size, channels): the centre square, upright.
    Transparency goes over white, 16 bits become 8. Raises what PIL raises on a broken file."""
    with Image.open(path) as img:
        img.draft(None, (size, size))  # JPEG only: shrinks by 2, 4 or 8 while decoding
        ImageOps.exif_transpose(img, in_place=True)  # cameras store the turn as a tag
        if img.mode.startswith("I"):
            img = Image.fromarray((np.asarray(img).clip(0, 65535) // 256).astype(np.uint8))
        if "transparency" in img.info or img.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img.convert("RGBA"))
        img = img.convert("L" if channels == 1 else "RGB")
        img = ImageOps.fit(img, (size, size), Image.Resampling.LANCZOS)
        return np.array(img).reshape(size, size, channels)
def load_folder(folder, size, channels, cache_folder):
    """Decodes a folder once into a cache, anew when it changes: uint8 (N, channels, size, size).
    Unreadable pictures are named, skipped, counted. Raises UserError if there are no others."""
    require(folder.is_dir(), "data", folder, "neither toyfaces, mnist or celebhq nor a folder")
    known = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files, seen = [], set()
    for where, subfolders, names in os.walk(folder, onerror=print, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # links may lead in circles
            names, subfolders[:] = [], []  # emptied in place: os.walk goes no deeper
        files += [Path(where, name) for name in names if name[0] != "."]
        seen.add(real)
    paths = sorted(f for f in files if f.suffix.lower() in known)
    require(paths, "data", folder, f"no images among {len(files)} files in and below it")
    stamp = [(str(p), os.lstat(p).st_size, os.lstat(p).st_mtime_ns) for p in paths]
    cache = cache_folder / f"{folder.resolve().name}-{fingerprint(size, channels, stamp)}.rgb"
    def decode(path):
        try:
            return decode_image(path, size, channels).tobytes()
        except Exception as error:  # PIL raises a dozen kinds
            print(f"skipped, unreadable: {str(path)!r} ({error})")
            return b""  # 0 bytes written: that counts as bad below
    if not cache.exists() or zlib.crc32(np.memmap(cache, mode="r")) != 0x2144DF1C:
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
        with new_file(cache) as file, ThreadPoolExecutor(4) as pool:
            bad = crc = 0  # PIL frees the interpreter lock; more than 4 threads only queue for it
            for i, data in enumerate(pool.map(decode, [paths[k] for k in order]), 1):
                bad, crc = bad + (file.write(data) == 0), zlib.crc32(data, crc)
                progress(f"decoding {i}/{len(paths)} images, {bad} unreadable", i == len(paths))
            require(bad < len(paths), "data", folder, f"none of its {bad} images is readable")
            file.write(crc.to_bytes(4, "little"))  # the CRC32 of data + its CRC is 0x2144DF1C
    images = torch.from_file(str(cache), size=cache.stat().st_size - 4, dtype=torch.uint8)
    return images.view(-1, size, size, channels).permute(0, 3, 1, 2)            # (N, C, H, W)

def load_images(data, data_root, size, channels):
    """(training images, held-out images), each uint8 (N, channels, size, size). Raises UserError.
    Held out: MNIST's test set, the last 1024 toy faces, a tenth of a folder but at most 1000."""
    root, folder = Path(data_root), Path(data)
    if data == "toyfaces":
        faces = torch.cat([toyfaces(range(i, i + 1024), size) for i in range(0, 9216, 1024)])
        return (faces if channels == 3 else TF.rgb_to_grayscale(faces)).split((8192, 1024))
    if data == "mnist":
        try:
            digits = [datasets.MNIST(root, train, download=True).data for train in (True, False)]
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data mnist: no download ({error}); unzip its four files into "
                            f"{Path(root, 'MNIST', 'raw').resolve()}") from error
        return [TF.resize(d[:, None], [size, size]).expand(-1, channels, -1, -1) for d in digits]
    if data == "celebhq":
        folder = next((root / name for name in CELEBHQ if (root / name).is_dir()), None)
        require(folder, "data", data, f"{root.resolve()} holds none of {', '.join(CELEBHQ)}: unpack"
                " CelebAMask-HQ or Kaggle's CelebA-HQ 256x256 there, or name it with --data")
    images = load_folder(folder, size, channels, root / "cache")
    require(len(images) > 1, "data", data, "one image is not enough to train on and to hold out")
    held = min(1000, math.ceil(len(images) / 10))
    return images[:-held], images[-held:]  # a fair split: load_folder has shuffled
def batch_indices(n, batch, seed, skip=0):
    """Endless index tensors (batch,) of shuffled epochs in a row, without the first `skip`."""
    g = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(n, generator=g).tolist() for _ in itertools.count())
    stream = itertools.islice(itertools.chain.from_iterable(epochs), skip * batch, None)
    while True:
        yield torch.tensor(list(itertools.islice(stream, batch)))
def to_float(images, device):
    """uint8 (B, C, H, W) -> float in [-1, 1] on the device, without waiting for it."""
    images = images.contiguous(memory_format=layout(device))
    if device.type == "cuda":
        images = images.pin_memory()  # only pinned memory is copied in the background
    return images.to(device, non_blocking=True).float() / 127.5 - 1

# ---- 3. Blocks: one set for the encoder, the decoder and the UNet -------------------------------
# ResNet block and attention as in DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B). Time
# embedding, attention, skip and resampling are arguments. The networks of 4 and 8 need no more.
class GroupNorm(nn.GroupNorm):
    """(B, c, H, W) -> the same shape: each group of 4 channels or more gets mean 0, variance 1.
    A group of one channel would lose its mean, the very thing that the channel has to say."""
    def __init__(self, c):
        super().__init__(math.gcd(32, max(1, c // 4)), c)  # DDPM's code has 32; gcd: a divisor
    def forward(self, x):
        if not torch.compiler.is_compiling():  # nn.GroupNorm would, compiled, copy to NCHW
            return super().forward(x)
        x, size = x.float(), self.num_channels // self.num_groups  # or E[x^2] - E[x]^2 loses digits
        pool = lambda v: v.mean((2, 3)).unflatten(1, (-1, size)).mean(2)        # (B, groups)
        each = lambda v: v.repeat_interleave(size, dim=1)                       # (B, c)
        var = pool(x.square()) - pool(x).square()                               # E[x^2] - E[x]^2
        scale = each((var + self.eps).rsqrt()) * self.weight
        shift = self.bias - each(pool(x)) * scale  # so x * scale + shift has the mean taken off
        return x * scale[:, :, None, None] + shift[:, :, None, None]            # (B, c, H, W)
def norm_silu_conv(c_in, c_out, bias=True):
    return nn.Sequential(GroupNorm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, 1, 1, bias=bias))
class TimeEmbedding(nn.Module):
    """Steps t (B,) -> (B, t_dim): sinusoids of geometric wavelengths, then an MLP."""
    def __init__(self, dim, t_dim):
        super().__init__()
        freqs = 10000 ** (-torch.arange(dim // 2) / (dim // 2))  # (dim / 2,), 1 .. about 1 / 10000
        self.register_buffer("freqs", freqs, persistent=False)  # a constant, not in checkpoints
        self.mlp = nn.Sequential(nn.Linear(dim // 2 * 2, t_dim), nn.SiLU(),
                                 nn.Linear(t_dim, t_dim), nn.SiLU())  # one SiLU for all ResBlocks
    def forward(self, t):
        angles = t[:, None].float() * self.freqs                                # (B, dim / 2)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))         # (B, t_dim)

class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W): two convolutions and a way around them."""
    def __init__(self, c_in, c_out, t_dim=None):
        super().__init__()
        self.conv1 = norm_silu_conv(c_in, c_out, bias=False)  # the next norm brings a bias
        self.conv2 = norm_silu_conv(c_out, c_out, bias=False)
        self.time = nn.Linear(t_dim, c_out) if t_dim else None  # t decides a shift per channel
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2[-1].weight)  # starts near the identity: signal and gradient pass
    def forward(self, x, t_emb=None):
        h = self.conv1(x)                                                       # (B, c_out, H, W)
        if self.time is not None:
            h = h + self.time(t_emb)[:, :, None, None]  # the same at every position
        return self.skip(x) + self.conv2(h)

class Attention(nn.Module):
    """(B, c, h, w) -> the same shape: every position looks at every other one; residual."""
    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.norm = heads, GroupNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)  # Linear: a 1x1 convolution
        nn.init.zeros_(self.proj.weight)  # starts near the identity, like ResBlock
    def forward(self, x):
        B, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)                        # (B, h*w, c)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for part in self.qkv(tokens).chunk(3, dim=2))       # (B, heads, h*w, c / heads)
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v, fused
        out = self.proj(out.transpose(1, 2).flatten(2))                         # (B, h*w, c)
        return x + out.transpose(1, 2).view(B, c, h, w)
class Layers(nn.Module):
    """`n` ResBlocks, each followed by attention if heads > 0; the first one changes the width."""
    def __init__(self, c_in, c_out, n, t_dim, heads):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_out if i else c_in, c_out, t_dim) for i in range(n))
        self.attn = nn.ModuleList(Attention(c_out, heads) if heads else nn.Identity()
                                  for _ in range(n))
    def forward(self, x, t_emb):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x, t_emb))
        return x
class DownBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H/2, W/2), or with down=False (B, c_out, H, W)."""
    def __init__(self, c_in, c_out, layers, t_dim=None, heads=0, down=True):
        super().__init__()
        self.layers = Layers(c_in, c_out, layers, t_dim, heads)
        self.down = nn.Conv2d(c_out, c_out, 3, stride=2, padding=1) if down else nn.Identity()
    def forward(self, x, t_emb=None):
        return self.down(self.layers(x, t_emb))
class MidBlock(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h, w): ResBlock, then `layers` times attention + ResBlock."""
    def __init__(self, c_in, c_out, layers, t_dim=None, heads=4):  # 4: in the autoencoders too
        super().__init__()
        self.layers = Layers(c_in, c_out, layers, t_dim, heads)  # the attention comes in between
        self.last = ResBlock(c_out, c_out, t_dim)
    def forward(self, x, t_emb=None):
        return self.last(self.layers(x, t_emb), t_emb)
class UpBlock(nn.Module):
    """(B, c_in, h, w), maybe a skip (B, c_skip, 2h, 2w) -> (B, c_out, 2h, 2w); up=False: h, w."""
    def __init__(self, c_in, c_out, layers, t_dim=None, heads=0, up=True, c_skip=0):
        super().__init__()  # nearest + conv: transposed convolutions leave checkerboards
        self.up = nn.Conv2d(c_in, c_in, 3, padding=1) if up else None
        self.layers = Layers(c_in + c_skip, c_out, layers, t_dim, heads)
    def forward(self, x, t_emb=None, skip=None):
        if self.up is not None:  # F.interpolate(x, scale_factor=2) with a gradient that is fast
            x = x.movedim(1, -1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)  # B h 2 w 2 c
            x = self.up(x.flatten(3, 4).flatten(1, 2).movedim(-1, 1))           # (B, c_in, 2h, 2w)
        return self.layers(x if skip is None else torch.cat([x, skip], dim=1), t_emb)

# ---- 4. Autoencoders: VQVAE and VAE differ only in what happens to the latent --------------------
# Both keep z easy to model in stage 2. VQVAE (van den Oord et al. 2017, arXiv 1711.00937): decoding
# only K different vectors, so z_e gathers around them; argmin has no gradient, hence the straight-
# through trick. VAE (Kingma & Welling 2013, 1312.6114): noise of a learned size is added to z, and
# a KL term stops the mean from outgrowing it: a smooth pull, z stays continuous, no trick needed.
def build_encoder(channels, widths, layers, c_out):
    """Network: image (B, C, H, W) -> (B, c_out, h, w) with h = H / 2 ** (len(widths) - 1)."""
    c = widths[-1]
    return nn.Sequential(  # the 1x1 at the end mixes and scales z, like VQGAN's quant_conv
        nn.Conv2d(channels, widths[0], 3, padding=1),
        *[DownBlock(a, b, layers) for a, b in zip(widths, widths[1:])],         # (B, c, h, w)
        MidBlock(c, c, layers), norm_silu_conv(c, c_out), nn.Conv2d(c_out, c_out, 1))
def build_decoder(channels, widths, layers, z_channels):
    """Network: latent (B, D, h, w) -> image (B, C, H, W), the encoder mirrored."""
    c, mirrored = widths[-1], widths[::-1]
    return nn.Sequential(
        nn.Conv2d(z_channels, z_channels, 1), nn.Conv2d(z_channels, c, 3, padding=1),
        MidBlock(c, c, layers), *[UpBlock(a, b, layers) for a, b in zip(mirrored, mirrored[1:])],
        norm_silu_conv(widths[0], channels))  # no tanh: [-1, 1] is learnt, and callers clamp

class VQVAE(nn.Module):
    """Autoencoder that replaces each latent vector by the nearest of K codebook vectors.
    Call restart_codes(z_e) before the first step and every hundred steps."""
    def __init__(self, channels, widths, layers, z_channels, codebook_size):
        super().__init__()
        self.encoder = build_encoder(channels, widths, layers, z_channels)
        self.decoder = build_decoder(channels, widths, layers, z_channels)
        self.codebook = nn.Parameter(torch.randn(codebook_size, z_channels))    # (K, D)
        self.register_buffer("usage", torch.zeros(codebook_size))  # picks since the last restart
    def quantise(self, z_e):
        """z_e (B, D, h, w) -> z_q (B, D, h, w), nearest codes (Eq. 1-2), and indices (B, h, w)."""
        with torch.no_grad(), torch.autocast(z_e.device.type, enabled=False):  # bf16 mistakes codes
            z = z_e.float().movedim(1, -1)                                      # (B, h, w, D)
            norms = self.codebook.square().sum(1)  # (K,); |z - e|^2 = |e|^2 - 2 z.e + |z|^2;
            dist = torch.addmm(norms, z.flatten(0, -2), self.codebook.T, alpha=-2)  # |z|^2 left out
            indices = dist.argmin(1).view(z.shape[:-1])                         # from (B*h*w, K)
        return F.embedding(indices, self.codebook).movedim(-1, 1), indices
    def forward(self, x):
        """x (B, C, H, W) in [-1, 1] -> reconstruction, {name: loss term}; Eq. 3, of equal value:
        codebook = |sg[z_e] - e|^2 pulls the codes, commit = |z_e - sg[e]|^2 pulls the encoder."""
        z_e = self.encode(x)
        z_q, indices = self.quantise(z_e)
        if self.training:
            picks = indices.flatten()
            self.usage.scatter_add_(0, picks, torch.ones_like(picks, dtype=torch.float32))
        z_st = z_e + (z_q - z_e).detach()  # straight-through: value of z_q, gradient as from z_e
        return self.decoder(z_st).float(), {"codebook": F.mse_loss(z_q, z_e.detach()),
                                            "commit": F.mse_loss(z_e, z_q.detach())}
    def encode(self, x):
        """The continuous z_e (B, D, h, w), which is what stage 2 models."""
        return self.encoder(x).float()  # float32 again: under autocast it is bf16 or fp16
    def decode(self, z):
        """(B, D, h, w) -> (B, C, H, W). Quantises first: small errors of stage 2 are gone then."""
        return self.decoder(self.quantise(z)[0]).float()
    @torch.no_grad()
    def restart_codes(self, z_e):
        """Moves the codes that nothing picked since the last call onto random outputs of the
        encoder, where they will be picked; the first call moves all."""
        z = z_e.float().movedim(1, -1).flatten(0, -2)                           # (B*h*w, D)
        new = z[torch.randint(len(z), (len(self.codebook),), device=z.device)]  # (K, D)
        new += 0.01 * z.std() * torch.randn_like(new)  # no two alike
        self.codebook.copy_(torch.where((self.usage == 0)[:, None], new, self.codebook))
        self.usage.zero_()

class VAE(nn.Module):
    """Autoencoder whose latent values are Gaussians; a KL term pulls them, weakly, to N(0, 1)."""
    def __init__(self, channels, widths, layers, z_channels):
        super().__init__()
        self.encoder = build_encoder(channels, widths, layers, 2 * z_channels)  # mean and logvar
        # starts with little noise, else the first thousands of steps are spent on getting rid of it
        nn.init.constant_(self.encoder[-1].bias[z_channels:], -6.0)             # of logvar
        self.decoder = build_decoder(channels, widths, layers, z_channels)
    def forward(self, x):
        """x (B, C, H, W) in [-1, 1] -> reconstruction, {"kl": KL(q(z | x) || N(0, 1))}, appendix B:
        -1/2 sum(1 + logvar - mean^2 - exp(logvar)), per image value like the reconstruction."""
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)                  # each (B, D, h, w)
        logvar = logvar.clamp(-30, 20)  # exp stays finite
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)  # reparameterised: Eq. 10
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum() / x.numel()  # / (B C H W)
        return self.decoder(z).float(), {"kl": kl}
    def encode(self, x):
        """The mean of q(z | x), (B, D, h, w): at the usual KL weight its spread is tiny."""
        return self.encoder(x).float().chunk(2, dim=1)[0]
    def decode(self, z):
        return self.decoder(z).float()                                          # (B, C, H, W)
def build_autoencoder(config, weights=None):
    """VQVAE or VAE from an AEConfig as a dict; with weights: frozen."""
    shape = [config[k] for k in ("channels", "widths", "layers", "z_channels")]
    ae = VQVAE(*shape, config["codebook_size"]) if config["ae"] == "vq" else VAE(*shape)
    ae.config = config
    if weights is not None:
        ae.load_state_dict(weights)
        ae.eval().requires_grad_(False)
    return ae

# ---- 5. LPIPS: how different two images look (Zhang et al. 2018, arXiv 1801.03924) ---------------
# Where z leaves details open, the least pixel error is their average (l2) or median (l1): blur. In
# a distance of features of an image classifier a blur is far away, so the decoder has to decide.
def vgg16_weights():
    """The `features.*` weights of torchvision's ImageNet VGG16, from torch.hub's cache or its URL.
    Raises UserError where there is neither."""
    url = models.VGG16_Weights.IMAGENET1K_V1.url
    try:
        w = torch.hub.load_state_dict_from_url(url, None, "cpu", check_hash=True, weights_only=True)
        return {k: v.float() for k, v in w.items() if k.startswith("features.")}
    except Exception as error:
        raise UserError(f"LPIPS needs {Path(url).name} ({error}): go online, or put it in "
                        f"{torch.hub.get_dir()}/checkpoints, or give --perceptual-weight 0")

class LPIPS(nn.Module):
    """Distance of two images as people see it: the `lpips` package with net="vgg", v0.1. Frozen.
    weights: file of the five 1x1 layers. vgg: `features.*` weights or None. Raises UserError."""
    def __init__(self, weights="lpips_weights.pth", vgg=None):
        super().__init__()
        with torch.device("meta"):  # no memory and no random numbers: the weights come next
            net = models.vgg16(weights=None)
        net.classifier = None  # 124 of VGG16's 138 million weights; the features do without
        net.load_state_dict(vgg16_weights() if vgg is None else vgg, assign=True)
        cuts = (0, 4, 9, 16, 23, 30)  # slices end with relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        self.slices = nn.ModuleList(net.features[a:b] for a, b in zip(cuts, cuts[1:]))
        try:
            lins = torch.load(weights, map_location="cpu", weights_only=True)
            for i in range(5):
                self.register_buffer(f"lin{i}", lins[f"lin{i}.model.1.weight"])     # (1, c, 1, 1)
        except Exception as error:
            raise UserError(f"{weights} missing or damaged: get it anew ({error!r:.50})") from error
        # ImageNet's mean and deviation per channel, for images in [-1, 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)
    def features(self, x):
        """x (B, 1 or 3, H, W) in [-1, 1] -> five feature maps. Below 16 pixels x is enlarged."""
        if min(x.shape[2:]) < 16:  # four poolings
            x = F.interpolate(x, scale_factor=math.ceil(16 / min(x.shape[2:])), mode="bilinear")
        h, maps = (x - self.shift) / self.scale, []  # by broadcasting, grey becomes three channels
        for part in self.slices:
            h = part(h)  # c = 64, 128, 256, 512, 512; side H / 1, 2, 4, 8, 16
            maps.append(h)
        return maps
    unit = staticmethod(lambda f: F.normalize(f.float(), dim=1))  # float32: squares overflow fp16
    def forward(self, x, y):
        """x, y (B, 1 or 3, H, W) -> distances (B,), Eq. 1: the sum over layers of
        mean_hw sum_c lin (unit(f_x) - unit(f_y))^2, lin being w^2. No gradient goes into y."""
        maps = zip(self.features(x), self.features(y.detach()))
        return sum((getattr(self, f"lin{i}") * (self.unit(a) - self.unit(b)).square())
                   .sum(1).mean((1, 2)) for i, (a, b) in enumerate(maps))

# ---- 6. PatchGAN: a critic of patches (Isola et al. 2017, arXiv 1611.07004) ----------------------
# The decoder also learns to fool it, which brings the fine texture that no distance asks for:
# VQGAN (Esser et al. 2021, arXiv 2012.09841).
class PatchGAN(nn.Module):
    """Images (B, C, H, W), at least 8x8 -> scores (B, 1, h', w'), one per patch; high is real."""
    def __init__(self, channels=3, width=64):
        super().__init__()
        self.net = nn.Sequential(  # 4, 2, 1: kernel, stride, padding, which halves H and W
            nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),  # no norm: paper
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.BatchNorm2d(4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 4, padding=2))  # h' = H / 8 + 1: a score sees 46x46 pixels
        for layer in self.net:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)  # as in the paper
    def forward(self, x):
        return self.net(x).float()
def generator_loss(kind, fake):
    """What the autoencoder minimises, from the scores of its images."""
    return {"bce": F.softplus(-fake), "lsgan": (fake - 1).square(), "hinge": -fake}[kind].mean()
def discriminator_loss(kind, real, fake):  # halved by custom (pix2pix); Adam hardly notices
    """What the discriminator minimises, from scores of images and of reconstructions."""
    return {"bce": F.softplus(-real).mean() + F.softplus(fake).mean(),  # -log D(x) - log(1 - D(x'))
            "lsgan": (real - 1).square().mean() + fake.square().mean(),
            "hinge": F.relu(1 - real).mean() + F.relu(1 + fake).mean()}[kind] / 2  # no pull past 1

# ---- 7. Noise scheduler: how noise goes in, and three ways to take it out ------------------------
# DDPM: Ho et al. 2020, arXiv 2006.11239. DDIM: Song et al. 2020, 2010.02502. DPM-Solver++(2M): Lu
# et al. 2022, 2211.01095. abar = product of 1 - beta, alpha = sqrt(abar), sigma = sqrt(1 - abar).
# A squared error is least for the mean of all eps that fit z_t, and that mean is -sigma times the
# score, the gradient of log p(z_t): plain regression finds the direction in which the data lie.
# One jump from pure noise would end at a blur, the average face; each small step commits to a bit.
class NoiseScheduler(nn.Module):
    """z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps. t = 0 has one step of noise, t = -1 has none.
    target is what the network predicts: eps, or v = alpha eps - sigma z0 (Salimans & Ho 2022, arXiv
    2202.00512). Near t = T-1 eps is almost z_t, a trivial task; v is almost -z0, a real one."""
    def __init__(self, T=1000, schedule="linear", target="v"):
        super().__init__()
        self.T, self.target = T, target
        if schedule == "linear":  # in sqrt(beta); LDM's range for CelebA-HQ, meant for T = 1000
            betas = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T, dtype=torch.float64) ** 2
            betas = betas * 1000 / T  # another T: as much noise at the end, about
        else:  # cosine: Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17
            u = torch.linspace(0, 1, T + 1, dtype=torch.float64)  # (t + 1) / T, from t = -1 on
            abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - abar[1:] / abar[:-1]  # Eq. 17 divides by f(0), which cancels here
        abar = torch.cumprod(1 - betas.clamp(max=0.999), dim=0)  # (T,); else cosine ends at 0
        self.register_buffer("alphas_cumprod", abar.float(), persistent=False)
        self.abar = abar.tolist() + [1.0]  # float64, for the samplers; t = -1 reads the 1.0
    def add_noise(self, z0, eps, t):
        """z0, eps (B, D, h, w) and t (B,) -> z_t, and what the network should answer to it.
        DDPM Eq. 4: any t in one go."""
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)                         # (B, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()  # alpha^2 + sigma^2 = 1: z_t has variance 1
        return alpha * z0 + sigma * eps, eps if self.target == "eps" else alpha * eps - sigma * z0
    def z0_and_eps(self, pred, z_t, t):
        """The network's answer at step t (int), as estimates of z0 and eps.
        z0 is not clamped, for latents have no fixed range."""
        alpha, sigma = math.sqrt(self.abar[t]), math.sqrt(1 - self.abar[t])
        if self.target == "v":  # v is z_t turned by 90 degrees, and these two turn it back
            return alpha * z_t - sigma * pred, sigma * z_t + alpha * pred
        return (z_t - sigma * pred) / alpha, pred  # DDPM Eq. 4 solved; at T-1, 1 / alpha is 84
    def timesteps(self, steps):
        """[(t, t_prev), ...], evenly spaced from the noisiest step T-1 down to -1, clean."""
        t = np.linspace(self.T - 1, -1, steps + 1).round().astype(int).tolist()
        return list(zip(t, t[1:]))  # 30 steps: (999, 966), (966, 932), .., (32, -1)
    def ddpm_step(self, z0, z_t, t, t_prev, noise):
        """Draws from q(z_prev | z_t, z0): DDPM Eq. 6-7 and Algorithm 2, for any t_prev < t."""
        abar, abar_prev = self.abar[t], self.abar[t_prev]
        a = abar / abar_prev                        # 1 - beta_t if t_prev = t - 1: DDPM's alpha_t
        mean = (math.sqrt(abar_prev) * (1 - a) * z0  # Eq. 7: more of z0, less of z_t near t = 0
                + math.sqrt(a) * (1 - abar_prev) * z_t) / (1 - abar)
        var = (1 - a) * (1 - abar_prev) / (1 - abar)  # 0 in the last step
        return mean + math.sqrt(var) * noise
    def ddim_step(self, z0, eps, t_prev):
        """The same z0 and eps, mixed with less noise: DDIM Eq. 12 with sigma = 0."""
        return math.sqrt(self.abar[t_prev]) * z0 + math.sqrt(1 - self.abar[t_prev]) * eps
    def dpm_step(self, z0, z_t, t, t_prev, last=None):
        """DPM-Solver++(2M), Algorithm 2: DDIM with z0 extrapolated from the step before.
        last: (t, z0) of the step before; None in the first one."""
        half_log_snr = lambda s: 0.5 * math.log(self.abar[s] / (1 - self.abar[s]))  # lambda_s
        if last is not None and t_prev >= 0:  # at t = -1 lambda is infinite: order 1, DDIM
            r = (half_log_snr(t) - half_log_snr(last[0])) / (half_log_snr(t_prev) - half_log_snr(t))
            z0 = z0 + (z0 - last[1]) / (2 * r)                                  # D_i
        abar, abar_prev = self.abar[t], self.abar[t_prev]
        shrink = math.sqrt((1 - abar_prev) / (1 - abar))                        # sigma_prev / sigma
        return shrink * z_t + (math.sqrt(abar_prev) - shrink * math.sqrt(abar)) * z0

# ---- 8. UNet, latent space, and the sampling loop that ties sections 4, 7 and 8 together ---------
# The blocks of section 3, now with time embedding and attention, and skips from down to up.
class UNet(nn.Module):
    """z_t (B, D, h, w), t (B,) -> prediction (B, D, h, w); 2 ** downs must divide h and w."""
    def __init__(self, z_channels, widths, downs, layers):
        super().__init__()
        t_dim = 4 * widths[0]  # as in DDPM's code
        self.time = TimeEmbedding(widths[0], t_dim)
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.downs, self.mid = nn.ModuleList(), MidBlock(widths[-1], widths[-2], layers, t_dim)
        self.ups = nn.ModuleList()
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            self.downs.append(DownBlock(a, b, layers, t_dim, heads=4, down=i < downs))
            c_out = widths[max(0, i - 1)]  # narrower before the resolution rises, which is cheaper
            self.ups.insert(0, UpBlock(a, c_out, layers, t_dim, heads=4, up=i < downs, c_skip=a))
        self.out = norm_silu_conv(widths[0], z_channels)
        nn.init.zeros_(self.out[-1].weight)  # first answers near 0, so the loss starts near 1
    def forward(self, z_t, t):
        t_emb = self.time(t)                                                    # (B, t_dim)
        x, skips = self.conv_in(z_t), []                                     # (B, widths[0], h, w)
        for down in self.downs:
            skips.append(x)  # what goes into a down block comes back in its mirror image
            x = down(x, t_emb)  # celebhq: (B, 256, 16, 16), (B, 384, 8, 8), (B, 512, 4, 4)
        x = self.mid(x, t_emb)                                 # (B, widths[-2], h / 2 ** downs, ..)
        for up in self.ups:
            x = up(x, t_emb, skips.pop())  # back: (B, 256, 8, 8), then 192 at 16x16, at 32x32
        return self.out(x).float()                                              # (B, D, h, w)
class LatentSpace:
    """The latents that the UNet sees, (z - mean) / std per channel, and the way back to images. The
    schedule expects variance 1: larger latents would show through at t = T-1, where sampling starts
    from pure noise; smaller ones drown at once (arXiv 2112.10752, section G). No ae: pixels."""
    def __init__(self, ae, mean, std):
        self.ae, self.mean, self.std = ae, mean, std                            # (1, D, 1, 1)
    def decode(self, z):
        z = z * self.std + self.mean
        return (self.ae.decode(z) if self.ae else z).clamp(-1, 1)

@torch.no_grad()
def sample_images(unet, scheduler, space, shape, n, seed, sampler="dpm", steps=30, batch=64,
                  dtype=None, trace=None):
    """Noise -> `n` images (n, C, H, W) in [-1, 1], on the CPU; shape: of a latent, (D, h, w).
    Image i has a noise generator of its own, so it does not depend on n or batch. `trace`, a
    list, gets (z_t, estimate of z0) of the first batch, step by step."""
    device, net, images = space.mean.device, unet, []  # net: the unet, or a CUDA graph of it
    for i in range(0, n, batch):
        own = [torch.Generator().manual_seed(seed * 1_000_003 + k) for k in range(n)[i:i + batch]]
        noise = lambda: torch.stack([torch.randn(shape, generator=g) for g in own]).to(device)
        z_t, last = noise(), None                                               # (batch, D, h, w)
        with autocast(device, dtype):
            t_now = torch.zeros(len(own), device=device)  # (batch,), filled with t in each step
            if device.type == "cuda" and (i == 0 or len(own) < batch):  # a CUDA graph: one launch
                net = torch.cuda.make_graphed_callables(lambda *a: unet(*a), (z_t.clone(), t_now))
            for t, t_prev in scheduler.timesteps(steps):
                pred = net(z_t, t_now.fill_(t))
                z0, eps = scheduler.z0_and_eps(pred, z_t, t)
                if trace is not None and i == 0:
                    trace.append((z_t, z0))
                if sampler == "ddpm":
                    z_t = scheduler.ddpm_step(z0, z_t, t, t_prev, noise())
                elif sampler == "ddim":
                    z_t = scheduler.ddim_step(z0, eps, t_prev)  # no new noise: the start decides
                else:
                    z_t = scheduler.dpm_step(z0, z_t, t, t_prev, last)
                last = (t, z0)
            images.append(space.decode(z_t).cpu())
        progress(f"{min(i + batch, n)}/{n} images", last=i + batch >= n)
    return torch.cat(images)

# ---- 9. Runs: a folder with checkpoints, a log, curves and pictures ------------------------------
# A stopped run goes on with the same command: batches and noise depend on seed and step alone.
FREE = "out data_root steps device amp compile log_every save_every".split()  # may change on resume
@contextlib.contextmanager
def new_file(path):
    """A file to write under a temporary name, renamed at the end: it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{path.name}.*.tmp"):
        if old.stat().st_mtime < time.time() - 600:  # a killed run's; a living one writes on
            old.unlink(missing_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
def save_whole(path, thing):
    torch.save(thing, buffer := io.BytesIO())  # torch would hide that a disk is full
    with new_file(path) as file:
        file.write(buffer.getbuffer())
def load_whole(path, device="cpu"):
    assert zipfile.ZipFile(path).testzip() is None  # checksums, which torch.load ignores
    return torch.load(path, map_location=device, weights_only=True)  # nothing in it is executed
def load_checkpoint(path, stage):
    """The dict that Run.save wrote. Raises UserError if it is missing, damaged or another kind."""
    if not path.is_file():
        raise UserError(f"{path.resolve()} is missing: first run train-{stage} for the same --out")
    try:
        ckpt = load_whole(path)
        assert ckpt["format"] == "ldm.py 3" and ckpt["stage"] == stage
        return ckpt
    except Exception as error:
        raise UserError(f"{path.resolve()} is damaged, or no checkpoint of this train-{stage}"
                        f" ({type(error).__name__}): delete it to train anew") from error
def fingerprint(*things):
    """A name for tensors and plain values: equal ones, equal name."""
    raw = (x.cpu().numpy().tobytes() if torch.is_tensor(x) else repr(x).encode() for x in things)
    return hashlib.sha256(b" ".join(raw)).hexdigest()[:16]
def progress(text, last=False):
    """A line that renews itself in a terminal; elsewhere a plain line every ten seconds."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{text}", end="\n" if last else "", flush=True)  # back to column 0, erase
    elif last or time.perf_counter() > progress.next:
        progress.next = time.perf_counter() + 10
        print(text, flush=True)
progress.next = -math.inf  # kept on the function: when to print next

class Run:
    """A training stage in its run folder: starts or resumes, logs, saves, stops on Ctrl-C; raises
    UserError if the checkpoint there does not fit. parts: {name: module, optimiser or scaler}."""
    def __init__(self, cfg, stage, device, dtype, parts, **extra):
        self.cfg, self.stage, self.parts, self.extra = cfg, stage, parts, extra
        self.dir, self.path = Path(cfg.out), Path(cfg.out, f"{stage}.pt")
        self.step, self.sums, self.stopping, self.last = 0, {}, False, False  # sums: since last log
        self.nets = {k: part for k, part in parts.items() if isinstance(part, nn.Module)}
        size = {k: f"{sum(w.numel() for w in net.parameters()) / 1e6:.2f} M"
                for k, net in self.nets.items()}
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        print(f"train-{stage} on {gpu}, {dtype or torch.float32}, PyTorch {torch.__version__}\n"
              f"  parameters {size}\n  settings {asdict(cfg)}")
        if self.path.exists():
            self.resume(load_checkpoint(self.path, stage))
        else:
            (self.dir / f"{stage}.csv").unlink(missing_ok=True)  # of a run without a checkpoint
    def resume(self, ckpt):
        for name, now in asdict(self.cfg).items():
            then = ckpt["config"].get(name)
            require(name in FREE or then == now, name, now, f"{self.path} was trained with {then}; "
                    "give that to go on, or another --out to start anew")
        if ckpt["extra"].get("ae_name") != self.extra.get("ae_name"):
            raise UserError(f"{self.path} belongs to another ae.pt: delete it or change --out")
        for name, part in self.parts.items():
            if state := ckpt["parts"][name]:  # a GradScaler that is off has none
                part.load_state_dict(state)
        self.step = ckpt["step"]
        print(f"going on at step {self.step} of {self.cfg.steps}: {self.path}")
    def loop(self):
        """Yields once per step, seeded: a resumed run draws the same numbers as one in one go.
        Raises KeyboardInterrupt after Ctrl-C or SIGTERM, once the step at hand is saved."""
        def stop(*_):
            self.stopping = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C kills
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}  # to put back
        groups = [g for part in self.parts.values() for g in getattr(part, "param_groups", ())]
        self.tick = self.step, time.perf_counter()  # (step, seconds) from which pace is counted
        try:
            while self.step < self.cfg.steps and not self.last:
                self.last = self.stopping or self.step + 1 == self.cfg.steps
                torch.manual_seed(self.cfg.seed * 1_000_003 + self.step)
                for group in groups:  # the learning rate rises linearly, then stays
                    group["lr"] = self.cfg.lr * min(1, (self.step + 1) / max(1, self.cfg.warmup))
                yield  # here the caller's for loop does its step
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
        if self.step < self.cfg.steps:
            print(f"\nstopped at step {self.step} and saved {self.path}: the same command goes on")
            raise KeyboardInterrupt  # main() makes exit code 130 of it
        peak = torch.cuda.max_memory_allocated() / 2 ** 30  # bytes -> GiB; 0 without CUDA
        print(f"trained: {self.path.resolve()}; curves.png and pictures/ are beside it"
              + f"; {peak:.2f} GiB of GPU memory at the peak" * (peak > 0))
    def due(self, *every):
        """Whether one of these intervals ends with this step; the last step ends all."""
        return self.last or any(self.step % k == 0 for k in every)
    def add(self, terms):
        """Sums loss terms up on the device: reading them in each step would make it wait."""
        for name, value in terms.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value.detach(), count + 1  # detached: lets the graph go
    def log(self, **more):
        """A line on the screen and a row in the CSV: of loss terms the means since the last line.
        Raises UserError if one is not finite, before that can get into a checkpoint."""
        means = {k: total / count for k, (total, count) in self.sums.items()}
        values = {k: float(v) for k, v in (means | more).items()}  # here the GPU is waited for
        if self.parts["scaler"].is_enabled():
            taken = next(iter(self.parts["opt"].state.values()))["step"]
            values["skipped"] = self.step - float(taken)  # as a gradient overflowed in fp16
        bad = [f"{k} is {v}" for k, v in values.items() if not math.isfinite(v)]
        bad += [f"a weight of {k} is not finite" for k, net in self.nets.items()
                if not sum(w.sum() for w in net.parameters()).isfinite()]  # one bad value spoils it
        if bad:
            raise UserError(f"{', '.join(bad)} at step {self.step}, which is not saved. --amp off "
                            f"goes on from {self.path}, if there; a lower --lr needs a new --out")
        pace = (self.step - self.tick[0]) / (time.perf_counter() - self.tick[1])  # steps per second
        speed, left = pace * self.cfg.batch * self.cfg.accum, (self.cfg.steps - self.step) / pace
        path = self.dir / f"{self.stage}.csv"
        rows = [r for r in read_csv(path) if int(r["step"]) < self.step]  # lost steps come again
        rows.append({"step": self.step, "per_second": round(speed, 1)} | values)
        names = dict.fromkeys(name for r in rows for name in r)  # a set in order; gan joins late
        lines = [",".join(names)] + [",".join(str(r.get(k, "")) for k in names) for r in rows]
        with new_file(path) as file:
            file.write("\n".join(lines).encode())
        losses = " ".join(f"{k} {v:.4g}" for k, v in values.items())
        progress(f"{self.stage} {self.step}/{self.cfg.steps}  {speed:.0f}/s  "
                 f"{left // 60:.0f}:{left % 60:02.0f} left  {losses}", self.last)
        self.sums, self.tick = {}, (self.step, time.perf_counter())
    def save(self, picture, columns=8):
        """Writes the checkpoint, the curves and a picture (N, C, H, W) of how far it is."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save_whole(self.path, {"format": "ldm.py 3", "stage": self.stage, "step": self.step,
                               "config": asdict(self.cfg), "parts": parts, "extra": self.extra})
        with new_file(self.dir / "pictures" / f"{self.stage}-{self.step:06d}.png") as file:
            image_grid(picture, columns).save(file, "PNG")
        draw_curves(self.dir)
        self.tick = self.step, time.perf_counter()  # saving is not training time
def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
def draw_curves(folder):
    """curves.png: a small panel for each column of ae.csv and ldm.csv, over the steps."""
    panels = []
    for stage in ("ae", "ldm"):
        rows = read_csv(folder / f"{stage}.csv")
        for name in list(rows[0])[1:] if rows else []:
            points = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
            panels += [(f"{stage} {name}", *zip(*points))] if len(points) > 1 else []
    image = Image.new("RGB", (1200, 170 * math.ceil(len(panels) / 4) + 1), "white")
    draw = ImageDraw.Draw(image)
    for i, (title, steps, values) in enumerate(panels):
        x, y, low, high = i % 4 * 300 + 10, i // 4 * 170 + 24, min(values), max(values)
        at = lambda step, v: (x + 280 * (step - steps[0]) / (steps[-1] - steps[0]),
                              y + 120 - 120 * (v - low) / (high - low or 1))
        draw.line([at(*point) for point in zip(steps, values)], fill="#1f5fbf", width=2)
        draw.text((x, y - 14), f"{title}: {low:.4g} .. {high:.4g}, last {values[-1]:.4g}", "black")
    image.save(folder / "curves.png")
def to_pil(x):
    """(C, H, W) in [-1, 1] -> PIL picture, rounded; PIL's own way with floats is to cut."""
    return TF.to_pil_image(((x.clamp(-1, 1) + 1) * 127.5).round().byte())
def image_grid(images, columns):
    """Images (N, 1 or 3, H, W) in [-1, 1] -> one PIL picture; tiny ones are enlarged."""
    images = F.interpolate(images.float().cpu(), scale_factor=max(1, 96 // images.shape[-1]))
    return to_pil(utils.make_grid(images, columns, pad_value=-1))
def latent_picture(z, size):
    """Latents (N, D, h, w) as images (N, 3, size, size): three channels as colours, or one grey."""
    z = z[:, :3] if z.shape[1] >= 3 else z[:, :1].expand(-1, 3, -1, -1)
    z = (z - z.mean((0, 2, 3), keepdim=True)) / (3 * z.std((0, 2, 3), keepdim=True) + 1e-6)
    return F.interpolate(z, size=(size, size))

# ---- 10. Training, what both stages share --------------------------------------------------------
# One skeleton: draw a batch, loss under autocast, backward, optimise; now and then log and save.
def optimise(scaler, optimiser, net):
    """One step on the gradients at hand; their norm is held below 1."""
    scaler.unscale_(optimiser)  # undoes the scaling of fp16: clipping needs the true norm
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    scaler.step(optimiser)  # with fp16: not if a gradient overflowed
    optimiser.zero_grad(set_to_none=True)
@torch.no_grad()
def update_ema(ema, model, step, limit):
    """ema = decay ema + (1 - decay) model. Adam's steps jitter around a good point, their average
    is nearer; (1 + n) / (10 + n) averages the last tenth, and limit caps it: longer blurs."""
    decay = min(limit, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
def compile_networks(cfg, device, *nets):
    """--compile, by default on CUDA where Triton is there. In place: names in checkpoints stay."""
    auto = (device.type == "cuda" and importlib.util.find_spec("triton") is not None
            and torch.cuda.get_device_capability()[0] >= 7)  # what Triton asks for: Volta
    if cfg.compile or (cfg.compile is None and auto):
        print("the first step compiles, for minutes; --no-compile starts at once, but is slower")
        warnings.filterwarnings("ignore", message="TensorFloat32")  # the codebook needs float32
        for net in nets:
            # CUDA graphs save launches, but a replay overwrites the gradients that --accum adds up
            net.compile(dynamic=False, mode="reduce-overhead" if cfg.accum == 1 else "default")

# ---- 11. Stage 1: the autoencoder ----------------------------------------------------------------
# VQGAN, arXiv 2012.09841, section 3.1: reconstruction + LPIPS + latent terms, and a GAN that
# starts late, when the rest is good enough for texture to matter. Adam's betas: VQGAN's code.
def psnr(x_rec, x):
    """Peak signal-to-noise ratio (B,) in dB of images in [-1, 1]: 10 log10(peak^2 / MSE)."""
    return 10 * torch.log10(4 / (x_rec - x).square().mean((1, 2, 3)).clamp(min=1e-10))  # 4: peak^2
def codebook_use(picks):
    """Picks per code (K,) -> codes in use in percent, perplexity exp(-sum p log p), at most K."""
    p = picks / picks.sum().clamp(min=1)  # no picks yet: 0 / 1, not 0 / 0
    return 100 * (p > 0).float().mean(), torch.special.entr(p).sum().exp()  # entr(p) = -p log p

def train_ae(cfg):
    """Trains a VQVAE or VAE to cfg.steps and leaves <out>/ae.pt. Raises UserError."""
    device, dtype = pick_device(cfg)
    images, held = load_images(cfg.data, cfg.data_root, cfg.size, cfg.channels)
    lpips = LPIPS(Path(__file__).with_name("lpips_weights.pth")) if cfg.perceptual_weight else None
    torch.manual_seed(cfg.seed)
    ae, disc = nets = build_autoencoder(asdict(cfg)), PatchGAN(cfg.channels)
    for net in filter(None, (*nets, lpips)):
        net.to(device, memory_format=layout(device))
    opt, opt_d = (torch.optim.Adam(n.parameters(), betas=(0.5, 0.9), fused=True) for n in nets)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # fp16 underflows
    ema = copy.deepcopy(ae).requires_grad_(False)
    parts = dict(ae=ae, ema=ema, disc=disc, opt=opt, opt_d=opt_d, scaler=scaler)
    run = Run(cfg, "ae", device, dtype, parts)
    order = batch_indices(len(images), cfg.batch, cfg.seed, skip=run.step * cfg.accum)
    preview = to_float(held[:16], device)
    weights = {k: vars(cfg)[k + "_weight"] for k in "recon codebook commit kl perceptual".split()}
    compile_networks(cfg, device, *filter(None, (ae, lpips)))

    for _ in run.loop():
        adversarial = cfg.gan_weight > 0 and run.step >= cfg.disc_start
        # over 1000 steps the weight rises: a critic that has learnt nothing would only do harm
        weights["gan"] = cfg.gan_weight * min(1, (run.step - cfg.disc_start) / 1000)
        for micro in range(cfg.accum):  # gradients add up over these; one step follows
            x = to_float(images[next(order)], device)                           # (B, C, H, W)
            if cfg.flip:
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
            if cfg.ae == "vq" and run.step % 100 == 0 and micro == 0:
                with torch.no_grad(), autocast(device, dtype):
                    ae.restart_codes(ae.encode(x))

            # (1) autoencoder: minimise the weighted sum of its terms
            with autocast(device, dtype):
                x_rec, terms = ae(x)
                terms["recon"] = (F.l1_loss if cfg.recon == "l1" else F.mse_loss)(x_rec, x)
                if lpips:
                    terms["perceptual"] = lpips(x_rec, x).mean()
                if adversarial:
                    disc.requires_grad_(False)  # gradients go through it, none stay in it
                    terms["gan"] = generator_loss(cfg.gan, disc(x_rec))
                    disc.requires_grad_(True)  # part (2) trains it
            loss = sum(weights[name] * term for name, term in terms.items())
            scaler.scale(loss / cfg.accum).backward()  # / accum: the sum becomes a mean

            # (2) discriminator: tell images from reconstructions
            if adversarial:
                with autocast(device, dtype):
                    real, fake = disc(x), disc(x_rec.detach())                  # (B, 1, h', w')
                terms["disc"] = discriminator_loss(cfg.gan, real, fake)
                scaler.scale(terms["disc"] / cfg.accum).backward()
                terms |= {"score_real": real.mean(), "score_fake": fake.mean()}  # only for the log
            run.add(terms)
        optimise(scaler, opt, ae)
        if adversarial:
            optimise(scaler, opt_d, disc)
        scaler.update()  # fp16: a smaller scale after an overflow, at times a larger one
        update_ema(ema, ae, run.step, cfg.ema)
        run.step += 1

        if run.due(cfg.log_every, cfg.save_every):
            with torch.no_grad(), autocast(device, dtype):
                z = ema.encode(preview)
                x_rec = ema.decode(z).clamp(-1, 1)
            more = {"held_psnr": psnr(x_rec, preview).mean(), "z_std": z.std()}
            if cfg.ae == "vq":
                more["codes_percent"], more["perplexity"] = codebook_use(ae.usage)
            run.log(**more)
        if run.due(cfg.save_every):  # picture rows: images, reconstructions, latents
            rows = preview, x_rec, latent_picture(z, cfg.size)
            run.save(torch.cat([r[:8].expand(-1, 3, -1, -1) for r in rows]), len(preview[:8]))

# ---- 12. Stage 2: diffusion on the latents -------------------------------------------------------
# The autoencoder is frozen, so each image is encoded once. The loss is DDPM Eq. 14, for v or eps.
@torch.no_grad()
def load_latents(cfg, ae, ae_name, images, device, dtype):
    """Latents of the images (with cfg.flip, mirrored too), (N, D, h, w) float16 on the device.
    From <out>/latents.pt if that is of this autoencoder and these images, else encoded."""
    def encode(i, flip):
        progress(f"encoding {i}/{len(images)}{', mirrored' * flip}")
        x = to_float(images[i:i + 16], device)  # few at once: it should not need more than training
        x = x.flip(3) if flip else x
        with autocast(device, dtype):
            return (ae.encode(x) if ae else x).half()  # errs by 1/2000; the noise at t = 0 is 0.04
    path = Path(cfg.out, "latents.pt")
    name = fingerprint(ae_name, cfg.flip, images.shape, images[::max(1, len(images) // 64)])
    try:
        return load_whole(path, device)[name]
    except Exception:  # not there, damaged, of another autoencoder or of other images
        flips = (False, True) if cfg.flip else (False,)
        latents = torch.cat([encode(i, f) for f in flips for i in range(0, len(images), 16)])
        save_whole(path, {name: latents})
        return latents

def train_ldm(cfg):
    """Trains a UNet on latents or pixels to cfg.steps and leaves <out>/ldm.pt. Raises UserError."""
    device, dtype = pick_device(cfg)
    ae, saved, ae_cfg, halvings = None, None, defaults(AEConfig, cfg.data), 0
    if cfg.space == "latent":
        ckpt = load_checkpoint(Path(cfg.out, "ae.pt"), "ae")
        ae_cfg = ckpt["config"]
        saved = {"config": ae_cfg, "weights": ckpt["parts"]["ema"]}  # what ldm.pt keeps of stage 1
        ae, halvings = build_autoencoder(**saved).to(device), len(ae_cfg["widths"]) - 1
        require(cfg.size in (0, ae_cfg["size"]), "size", cfg.size, f"ae.pt has {ae_cfg['size']}")
    cfg.size = cfg.size or ae_cfg["size"]
    side = cfg.size // 2 ** halvings  # of what the UNet sees
    require(side % 2 ** cfg.downs == 0, "downs", cfg.downs, f"{side} cannot be halved so often")
    require(side <= 64, "size", cfg.size, f"is {side}x{side} to the UNet, too much to attend over: "
            "at most 64x64; a smaller --size, or one more entry in the --widths of train-ae")
    images, _ = load_images(cfg.data, cfg.data_root, cfg.size, ae_cfg["channels"])
    ae_name = fingerprint(*(saved["weights"].values() if saved else []))
    z_all = load_latents(cfg, ae, ae_name, images, device, dtype)               # (N, D, h, w)
    std, mean = torch.std_mean(z_all.float(), (0, 2, 3), keepdim=True)          # (1, D, 1, 1)
    space, shape = LatentSpace(ae, mean, std), list(z_all.shape[1:])  # shape: (D, h, w)
    torch.manual_seed(cfg.seed)
    unet = UNet(shape[0], cfg.widths, cfg.downs, cfg.layers)
    unet.to(device, memory_format=layout(device))
    ema = copy.deepcopy(unet).requires_grad_(False)
    scheduler = NoiseScheduler(schedule=cfg.schedule, target=cfg.target).to(device)
    opt = torch.optim.Adam(unet.parameters(), betas=(0.9, 0.99), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(cfg, "ldm", device, dtype, dict(unet=unet, ema=ema, opt=opt, scaler=scaler), ae=saved,
              ae_name=ae_name, mean=mean.cpu(), std=std.cpu(), shape=shape)
    print(f"  latents {tuple(z_all.shape)}, mean {mean.flatten()}, std {std.flatten()}")
    order = batch_indices(len(z_all), cfg.batch, cfg.seed, skip=run.step * cfg.accum)
    compile_networks(cfg, device, unet)

    for _ in run.loop():
        for _ in range(cfg.accum):
            z0 = (z_all[next(order).to(device, non_blocking=True)].float() - mean) / std
            t = torch.randint(scheduler.T, (len(z0),), device=device)           # (B,)
            z_t, target = scheduler.add_noise(z0, torch.randn_like(z0), t)      # (B, D, h, w)
            with autocast(device, dtype):
                loss = F.mse_loss(unet(z_t, t), target)
            scaler.scale(loss / cfg.accum).backward()
            run.add({"loss": loss})
        optimise(scaler, opt, unet)
        scaler.update()
        update_ema(ema, unet, run.step, cfg.ema)
        run.step += 1

        if run.due(cfg.log_every, cfg.save_every):
            run.log()
        if run.due(cfg.save_every):
            run.save(sample_images(ema, scheduler, space, shape, 16, cfg.seed, dtype=dtype))

# ---- 13. Sampling and evaluation -----------------------------------------------------------------
def find_run(cfg, *stages):
    """The first of these stages in --out, or in the newest folder of runs/. Raises UserError."""
    folders = [Path(cfg.out)] if cfg.out else Path("runs").glob("*")
    found = [f / f"{stage}.pt" for f in folders for stage in stages if (f / f"{stage}.pt").exists()]
    if not found:
        raise UserError(f"no {stages[0]}.pt in {Path(cfg.out or 'runs').resolve()}: first train-ae"
                        " and train-ldm, or name a run folder with --out")
    newest = lambda p: max(q.stat().st_mtime for q in p.parent.glob("*.pt"))
    return max(found, key=lambda p: (newest(p), p.stem == stages[0]))  # on a tie the first stage
def load_ldm(path, device):
    """(UNet, scheduler, latent space, latent shape), as sample_images takes them; settings."""
    ckpt = load_checkpoint(path, "ldm")
    config, extra = ckpt["config"], ckpt["extra"]
    unet = UNet(extra["shape"][0], *(config[k] for k in ("widths", "downs", "layers")))
    unet.load_state_dict(ckpt["parts"]["ema"])
    unet.to(device, memory_format=layout(device)).eval().requires_grad_(False)
    ae = build_autoencoder(**extra["ae"]).to(device) if extra["ae"] else None
    scheduler = NoiseScheduler(schedule=config["schedule"], target=config["target"])
    space = LatentSpace(ae, extra["mean"].to(device), extra["std"].to(device))
    return (unet, scheduler, space, extra["shape"]), config

def sample(cfg):
    """Writes samples.png into the run folder; on request each image, and the denoising."""
    device, dtype = pick_device(cfg)
    path, trace = find_run(cfg, "ldm"), [] if cfg.progress else None
    model, _ = load_ldm(path, device)
    n, folder = cfg.n or 16, path.parent
    images = sample_images(*model, n, cfg.seed, cfg.sampler, cfg.steps, cfg.batch, dtype, trace)
    image_grid(images, math.ceil(math.sqrt(n))).save(folder / "samples.png")
    if cfg.save_images:
        (folder / "samples").mkdir(exist_ok=True)
        for i, image in enumerate(images):
            to_pil(image).save(folder / "samples" / f"{i:05d}.png")
    if cfg.progress:
        save_progress(trace, model[2], folder)  # model[2]: the LatentSpace
    print(f"in {folder.resolve()}: samples.png" + ", samples/" * cfg.save_images
          + ", progress.png, progress.gif" * cfg.progress)

@torch.no_grad()
def save_progress(trace, space, folder):
    """progress.png, per image three rows: z_t, z_t decoded, the guess of z0 decoded; and a GIF."""
    trace = trace + [(trace[-1][1], trace[-1][1])]  # after the last step z_t is the last z0
    pick = lambda n: [trace[k] for k in np.linspace(0, len(trace) - 1, n).round().astype(int)]
    rows = []
    for i in range(min(4, len(trace[0][0]))):
        z_t, z0 = (torch.stack([z[i] for z in column]) for column in zip(*pick(8)))  # (8, D, h, w)
        x_t, x0 = space.decode(z_t), space.decode(z0)                           # (8, C, H, W)
        rows += [r.expand(-1, 3, -1, -1) for r in (latent_picture(z_t, x_t.shape[-1]), x_t, x0)]
    image_grid(torch.cat(rows), 8).save(folder / "progress.png")
    frames = [image_grid(space.decode(z_t[:4]), 2) for z_t, _ in pick(min(len(trace), 40))]
    frames[0].save(folder / "progress.gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=[80] * (len(frames) - 1) + [2000])  # ms; the result stays for 2 s

def frechet_distance(a, b):
    """Between Gaussians fitted to features a, b (N, c): |mu_a - mu_b|^2 + tr(S_a + S_b -
    2 (S_a S_b)^(1/2)); Heusel et al. 2017, arXiv 1706.08500."""
    if min(len(a), len(b)) < 2:
        return math.nan
    a, b = a.double(), b.double()  # large sums almost cancel: float32 loses digits
    S_a, S_b = torch.cov(a.T), torch.cov(b.T)                                   # (c, c)
    cross = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0).sqrt().sum()  # tr (S_a S_b)^(1/2)
    return (a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * cross

@torch.no_grad()
def evaluate(cfg):
    """Prints and returns {figure: value}, of images held out from training. Raises UserError."""
    device, dtype = pick_device(cfg)
    path, model, lpips = find_run(cfg, "ldm", "ae"), None, None
    if path.stem == "ldm":
        model, config = load_ldm(path, device)
        ae = model[2].ae
    else:
        ckpt = load_checkpoint(path, "ae")
        config = ckpt["config"]
        ae = build_autoencoder(config, ckpt["parts"]["ema"]).to(device)
    ae_cfg = ae.config if ae else defaults(AEConfig, config["data"])
    root = cfg.data_root or config["data_root"]
    train, held = load_images(config["data"], root, config["size"], ae_cfg["channels"])
    try:
        lpips = LPIPS(Path(__file__).with_name("lpips_weights.pth")).to(device)
    except UserError as error:
        print(f"without LPIPS and Frechet distances: {error}")
    def batched(net, *images):  # images lie on the CPU, 32 at a time go to the device
        parts = zip(*(i.split(32) for i in images))  # parts of x and y that belong together
        with autocast(device, dtype):
            return torch.cat([net(*(p.to(device) for p in part)).cpu() for part in parts])
    features = lambda x: batched(lambda p: lpips.features(p)[-1].float().mean((2, 3)), x)
    x, table = to_float(held, torch.device("cpu")), {}
    if ae:
        z = batched(ae.encode, x)
        x_rec = batched(lambda z: ae.decode(z).clamp(-1, 1), z)
        table["PSNR, dB"] = psnr(x_rec, x).mean()
    if ae and ae_cfg["ae"] == "vq":
        table["codes in use, %"], table["perplexity"] = codebook_use(
            batched(lambda z: ae.quantise(z)[1], z).flatten().bincount(minlength=len(ae.codebook)))
    if lpips:
        real, others = features(x), features(to_float(train[:len(held)], torch.device("cpu")))
        table["FD, as many training images"] = frechet_distance(others, real)  # what real ones get
    if lpips and ae:
        table["LPIPS"] = batched(lpips, x_rec, x).mean()
        table["FD, reconstructions"] = frechet_distance(features(x_rec), real)
    if lpips and model:
        n, name = cfg.n or 2000, f"FD, {cfg.n or 2000} samples ({cfg.sampler}, {cfg.steps} steps)"
        fake = sample_images(*model, n, cfg.seed, cfg.sampler, cfg.steps, cfg.batch, dtype)
        table[name] = frechet_distance(features(fake), real)
    print(f"{path.resolve()} on {len(held)} held-out images, side {config['size']}",
          *(f"  {name:42} {float(value):.4g}" for name, value in table.items()), sep="\n")
    print("FD: Frechet distance of VGG16 relu5_3 features; this is not the published Inception FID")
    return table

# ---- 14. Command line ----------------------------------------------------------------------------
def demo(cfg):
    """Both stages and samples, by default on toy faces at a tiny size; these need no download."""
    train_ae(resolve(AEConfig, asdict(cfg)))
    train_ldm(resolve(LDMConfig, asdict(cfg)))
    sample(resolve(SampleConfig, asdict(cfg) | {"n": 64, "progress": True}))
COMMANDS = {  # name: (settings, function, help)
    "train-ae": (AEConfig, train_ae, "stage 1: train the autoencoder"),
    "train-ldm": (LDMConfig, train_ldm, "stage 2: train the diffusion model on its latents"),
    "sample": (SampleConfig, sample, "make new images"),
    "eval": (SampleConfig, evaluate, "measure the autoencoder and the samples on held-out images"),
    "demo": (RunConfig, demo, "both stages and samples in a few minutes")}
def build_parser():
    """A subcommand per entry of COMMANDS, a flag per field of its settings."""
    parser = argparse.ArgumentParser(prog="ldm.py", description="latent diffusion in one file")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (cls, _, help) in COMMANDS.items():
        sub = subparsers.add_parser(command, help=help, description=help,
                                    usage=f"ldm.py {command} [--help] [--FLAG VALUE ...]")
        for f in fields(cls):
            kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                    dict(type=int, nargs="+") if f.type is tuple else
                    dict(type=f.type, choices=f.metadata["choices"]))
            presets = "".join(f"; {d}: {v}" for d, v in f.metadata["presets"].items())
            sub.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                             help=f"{f.metadata['help']} (default: {f.default}{presets})")
    return parser

def main(argv=None):
    """Runs a command line; returns the exit code: 0 done, 2 a mistake, 130 stopped by Ctrl-C."""
    given = vars(build_parser().parse_args(argv))  # only what was typed: argparse.SUPPRESS
    cls, command, _ = COMMANDS[given.pop("command")]
    try:
        command(resolve(cls, given))
        return 0
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError, RuntimeError) as error:
        message = str(error)
        if "out of memory" in message or "allocate memory" in message:
            message = "out of memory: lower --batch (training: raise --accum by as much), or --size"
        elif isinstance(error, RuntimeError):  # a mistake of ours: its traceback is needed
            raise
    print(f"ldm.py: error: {message}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
