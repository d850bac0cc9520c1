"""Tests of ldm.py in the order of its sections: against formulas or brute force, on a CPU alone."""
import ast
import contextlib
import dis
import io
import math
import os
import re
import runpy
import shutil
import signal
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision import models

import ldm

torch.set_num_threads(1)  # the networks are so small that threads only wait for each other
HERE = Path(ldm.__file__).resolve().parent
TEXT, README = ((HERE / name).read_text() for name in ("ldm.py", "README.md"))
SIGNALS = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
TINY = {"ae": dict(size=16, widths=(8, 16), layers=1, z_channels=2, codebook_size=16, batch=4,
                   steps=4, lr=2e-3, perceptual_weight=0.0, gan_weight=0.0),
        "ldm": dict(widths=(16, 24), layers=1, batch=8, steps=4, lr=2e-3)}
GAN = dict(ae="kl", gan_weight=500.0)
close, each = torch.testing.assert_close, pytest.mark.parametrize
refused = partial(pytest.raises, ldm.UserError)

# ---- Helpers ------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def clean_start(tmp_path, monkeypatch, request):
    """An empty folder, fixed random numbers, made-up VGG16 weights and no GPU for each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.VGG16_Weights, "get_state_dict",
                        lambda *_, **__: request.getfixturevalue("vgg"), raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", Mock(return_value=False))
    torch.manual_seed(0)
    handlers = {s: signal.signal(s, signal.default_int_handler) for s in SIGNALS}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)

@pytest.fixture(scope="module")
def vgg():
    """VGG16 `features.*` weights from a formula, of the usual size; no random generator."""
    with torch.device("meta"):
        state = models.vgg16().features.state_dict(prefix="features.")
    for name, w in state.items():
        wave = torch.arange(w.numel(), dtype=torch.float64).square().mul(0.1).sin().view(w.shape)
        fan_in = w[0].numel() if w.dim() > 1 else 400
        state[name] = (wave * (4 / fan_in) ** 0.5).float()
    return state

@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A folder of 40 PNGs (20x20): 36 to train on, 4 held out."""
    folder = tmp_path_factory.mktemp("faces")
    for i in range(40):
        Image.fromarray(ldm.draw_face(i, 20)).save(folder / f"{i:02}.png")
    return folder

@pytest.fixture(scope="module")
def train(faces, tmp_path_factory):
    """train(stage, out, **settings): a tiny training on the faces, returns its checkpoint. For
    stage 2 a new folder gets an autoencoder. train.root: a folder with finished ones."""
    def run(stage, out="new", log_every=2, **settings):
        if stage == "ldm" and not Path(out).exists():
            shutil.copytree(root / "ae", out)
        given = TINY[stage] | dict(data=faces, data_root=root, out=out) | settings
        with pytest.MonkeyPatch.context() as patch:  # rows of the log: in ldm.py every 100 steps
            patch.setattr(ldm.Run, "due", lambda self, n: due(self, {100: log_every}.get(n, n)))
            command(f"train-{stage}", *words(given))
        return ldm.load_file(Path(out, f"{stage}.pt"), stage)
    due, sample = ldm.Run.due, ldm.LatentDiffusion.sample.__wrapped__
    defaults = sample.__defaults__
    sample.__defaults__ = (0, "dpm", 4, *defaults[3:])  # 4 steps for pictures, not 30
    run.root = root = tmp_path_factory.mktemp("runs")
    run("ae", root / "ae")
    run("ldm", root / "both")
    yield run
    sample.__defaults__ = defaults

@pytest.fixture
def out(train, clean_start):
    """A run folder with both stages, of this test alone."""
    return shutil.copytree(train.root / "both", Path("out").absolute())

def spy(monkeypatch, owner, name):
    """A list that gets the arguments of each call of owner.name."""
    def spied(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, spied)
    return calls

def signal_at(monkeypatch, step, number=signal.SIGINT):
    """Makes trainings of this process get the signal in that step."""
    def spied(cfg, now):
        if now == step:
            signal.raise_signal(number)
        return rate(cfg, now)
    rate = ldm.learning_rate
    monkeypatch.setattr(ldm, "learning_rate", spied)

def words(given):
    """Settings as words of a command line."""
    for name, value in given.items():
        yield f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        if not isinstance(value, bool):
            yield from map(str, value if isinstance(value, tuple) else [value])

def command(*line):
    """Runs a command line. Exit code 2 becomes a UserError with its line, 130 KeyboardInterrupt."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = ldm.main([*line])
    if code:
        assert code == 130 or re.fullmatch("ldm.py: error: .*\n", stderr.getvalue())
        raise {2: ldm.UserError, 130: KeyboardInterrupt}[code](stderr.getvalue())

def shaken(net):
    """The network with every weight random, also those that start at zero."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net

def keys(images):
    """A set with the content of each image of a batch."""
    return {x.contiguous().numpy().tobytes() for x in images}

def pixels(path):
    """A picture file as an array of whole numbers."""
    return np.asarray(Image.open(path)).astype(int)

def wrong_files(whole):
    """What may lie at the place of the file with this content, {kind: content}."""
    torch.save({"a": torch.ones(1000)}, "other")
    return dict(other=Path("other").read_bytes(), half=whole[:len(whole) // 2], cut=whole[:-999],
                page=b"<html>", empty=b"", code=b"cos\nmkdir\n(S'trap'\ntR.")  # makes a folder

# ---- The file -----------------------------------------------------------------------------------
TEXTS = re.split(r"^# ---- \d+\. .*$", TEXT, flags=re.M)  # above the first banner, each section
ALONE = re.findall(r"^class (?:VectorQ|Muon).*?(?=^class |^def )", TEXT, re.M | re.S)

def global_names(code):
    """The names that functions inside this code look up outside of themselves."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return names.union(*(global_names(c) for c in code.co_consts if hasattr(c, "co_consts")))

def test_file_is_tidy_and_importing_it_is_silent_also_by_a_link(capfd):
    """It imports four packages, prints and creates nothing, and finds its weights in its folder."""
    assert max(map(len, TEXT.splitlines())) <= 100
    numbers = re.findall(r"^# ---- (\d+)\. [A-Z].* -+$", TEXT, re.M)
    assert numbers == [str(i + 1) for i in range(TEXT.count("\n# ----"))]
    nodes = [n for n in ast.walk(ast.parse(TEXT)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {(getattr(n, "module", 0) or a.name).split(".")[0] for n in nodes for a in n.names}
    assert names - sys.stdlib_module_names == {"torch", "torchvision", "PIL", "numpy"}
    Path("link.py").symlink_to(HERE / "ldm.py")
    assert runpy.run_path("link.py")["LPIPS_WEIGHTS"].exists()
    assert capfd.readouterr() == ("", "") and os.listdir() == ["link.py"]

@each("parts", [*zip([TEXTS[1], *TEXTS[3:6], TEXTS[7], *ALONE]), TEXTS[1:3], TEXTS[1:7:5]])
def test_each_class_can_be_copied_out_of_the_file(parts):
    """The imports do for sections 1, 3, 4, 5, 7, quantiser and Muon; 2 and 6 need the first."""
    code, names = compile("".join([TEXTS[0], *parts]), "copy.py", "exec"), {}
    exec(code, names)
    assert global_names(code) <= {*names, *names["__builtins__"]}  # in errors, too

# ---- 1. Blocks ----------------------------------------------------------------------------------
@each("t_dim, heads, resample, layers", [
    (None, 0, True, 1), (12, 4, True, 2), (12, 0, False, 1), (None, 4, False, 2)])
def test_block_switches_change_only_what_they_name(t_dim, heads, resample, layers):
    """Time, attention, resampling and skips are each on or off; the mid block has attention."""
    x, t_emb = torch.randn(2, 8, 8, 8), torch.randn(2, t_dim) if t_dim else None
    smaller, larger = (4, 16) if resample else (8, 8)
    skip = torch.randn(2, 4, larger, larger)
    down = ldm.DownBlock(8, 16, layers, t_dim, heads, down=resample)
    mid = ldm.MidBlock(8, 16, layers, t_dim)
    up = ldm.UpBlock(8, 16, layers, t_dim, heads, up=resample, c_skip=4)
    for block, skips, side in ((down, (), smaller), (mid, (), 8), (up, (skip,), larger)):
        y = shaken(block)(x, t_emb, *skips)
        attentions = [m for m in block.modules() if isinstance(m, ldm.Attention)]
        assert y.shape == (2, 16, side, side)
        assert len(attentions) == (layers if heads or block is mid else 0)
        assert t_dim is None or not torch.allclose(y, block(x, -t_emb, *skips))
    assert not torch.allclose(up(x, t_emb, skip), up(x, t_emb, -skip))
    up.smooth, up.blocks = up.smooth and nn.Identity(), ldm.Stack()
    assert torch.equal(up(x)[..., 1::2, ::2] if resample else up(x), x)  # nearest

def test_layers_equal_their_formulas_and_start_as_their_shortcut():
    """A new layer adds only a bias, time one per channel; no channel is normalised alone."""
    x, t_emb = torch.randn(2, 8, 3, 5), torch.randn(2, 5)
    for layer in (ldm.ResBlock(8, 8), ldm.Attention(8, heads=2)):
        assert (layer(x) - x).std((2, 3)).max() < 1e-6
    q, k, v = shaken(layer).qkv(layer.norm(x).flatten(2).mT).chunk(3, dim=2)  # each (B, 15, 8)
    out = torch.cat([(q[..., head] @ k[..., head].mT / 4 ** 0.5).softmax(2) @ v[..., head]
                     for head in (slice(0, 4), slice(4, 8))], 2)
    close(layer(x), x + layer.proj(out).mT.view_as(x))
    block = shaken(ldm.ResBlock(8, 12, t_dim=5))
    h = block.conv1(x) + block.time(t_emb).view(2, 12, 1, 1)
    close(block(x, t_emb), block.shortcut(x) + block.conv2(h))
    for c in (4, 8, 12, 16, 24, 48, 64, 128, 192, 512):
        groups = ldm.group_norm(c).num_groups
        assert [type(m) for m in ldm.norm_silu_conv(c, 4)] == [nn.GroupNorm, nn.SiLU, nn.Conv2d]
        assert c % groups == 0 and c // groups >= 4 and groups <= 32

# ---- 2. Autoencoders ----------------------------------------------------------------------------
@pytest.fixture
def vq():
    """A small VQVAE with 64 codes of 4 numbers."""
    return shaken(ldm.VQVAE(1, (8, 8), layers=1, z_channels=4, codebook_size=64))

@each("channels, widths, latent", [(3, (8, 16, 16, 8), (2, 3)), (1, (8, 12), (8, 12))])
def test_each_width_after_the_first_halves_the_image(channels, widths, latent):
    """The latent of both autoencoders is as small as the widths say, and the image comes back."""
    x = torch.randn(2, channels, 16, 24)
    for ae in (ldm.VQVAE(channels, widths, 1, 5, 16), ldm.VAE(channels, widths, 1, 5)):
        z = ae.encode(x)
        assert z.shape == (2, 5, *latent) and ae(x)[0].shape == ae.decode(z).shape == x.shape

def test_quantiser_finds_the_nearest_code(vq):
    """Codes are those of a search in float64, even under bf16 autocast, with its many errors."""
    z_e, codes = torch.randn(4, 4, 12, 12), vq.quantizer.codebook.weight
    with torch.autocast("cpu", torch.bfloat16):
        z_q, indices = vq.quantizer.quantise(z_e)
    vectors = z_e.double().movedim(1, -1).reshape(-1, 1, 4)
    nearest = (vectors - codes.double()).square().sum(-1).argmin(1)
    assert torch.equal(indices.view(-1), nearest) and torch.equal(z_q, codes[indices].movedim(3, 1))

def test_gradients_pass_and_stop_at_the_quantiser_as_equation_3_says(vq):
    """The decoder's goes straight to z_e; one loss moves only the codes, the other only z_e."""
    z_e, codes = torch.randn(2, 4, 3, 3, requires_grad=True), vq.quantizer.codebook.weight
    vq.encode = Mock(return_value=z_e)
    x_rec, losses = vq(torch.zeros(2, 1, 6, 6))
    z_q = vq.quantizer.quantise(z_e)[0].detach().requires_grad_()
    expected = vq.decoder(z_q)
    close([x_rec, vq.decode(z_e)], [expected, expected], rtol=1e-4, atol=1e-5)
    (x_rec.square().sum() + expected.square().sum()).backward()
    close(z_e.grad, z_q.grad, rtol=1e-3, atol=1e-5)
    assert z_e.grad.abs().max() > 0 and not torch.allclose(z_q, z_e)
    weights = [codes, z_e, *vq.decoder.parameters()]
    for term, moved in (("codebook", codes), ("commit", z_e)):
        close(losses[term], (z_e - z_q).square().mean())
        gradients = torch.autograd.grad(losses[term], weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients):
            assert gradient.any() if weight is moved else gradient is None

def test_restart_moves_dead_codes_onto_the_data(vq):
    """The first call moves all codes, however far the data are, and later ones only unused ones."""
    layer, far = vq.quantizer, 50 + 3 * torch.randn(2, 4, 16, 16)
    layer.restart(far)
    codes = layer.codebook.weight.detach().clone()
    nearest = torch.cdist(codes, far.movedim(1, -1).reshape(-1, 4)).min(1)
    assert nearest.values.max() < 0.5 and nearest.indices.max() >= 256  # of both images
    assert len(codes.unique(dim=0)) == 64 and len(layer.quantise(far)[1].unique()) > 55
    vq.encode = Mock(return_value=far[:1, :, :4, :4])
    vq(torch.zeros(1, 1, 8, 8))
    picks = layer.quantise(vq.encode(0))[1].flatten().bincount(minlength=64)
    assert torch.equal(layer.usage, picks.float()) and 0 < (picks > 0).sum() < 64
    layer.restart(torch.randn(2, 4, 4, 4))
    assert torch.equal((layer.codebook.weight != codes).any(1), picks == 0)
    assert layer.usage.sum() == 0 and [*map(float, ldm.codebook_use(layer.usage))] == [0, 1]
    close(ldm.codebook_use(torch.tensor([3, 3, 0, 0])), (torch.tensor(50.0), torch.tensor(2.0)))

def test_vae_sample_is_reparameterised_and_kl_is_that_of_torch_distributions():
    """z has the encoder's mean and deviation, both get a gradient, and KL is per image value."""
    vae, x = ldm.VAE(1, (8, 8), 1, 2), torch.randn(4, 1, 64, 64)
    vae.decoder = nn.Identity()
    assert (vae.encoder(x)[:, 2:] / 2).exp().max() < 0.2  # else it would learn to shout first
    mean, logvar = ((s * torch.randn(4, 2, 32, 32)).requires_grad_() for s in (1, 3))
    vae.encoder.forward = Mock(return_value=torch.cat([mean, logvar], 1))
    z, losses = vae(x)
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum() / x.numel()
    close([losses["kl"], vae.encode(x)], [kl, mean])
    noise = (z - mean) / q.stddev
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    z.sum().backward()
    close([mean.grad, logvar.grad], [torch.ones_like(z), (z - mean) / 2])  # dz / dlogvar
    for extreme in (-1e4, 1e4):  # exp(logvar) must stay in range
        vae.encoder.forward = Mock(return_value=torch.full((4, 4, 32, 32), extreme))
        x_rec, losses = vae(x)
        assert x_rec.isfinite().all() and losses["kl"].isfinite()

# ---- 3. LPIPS -----------------------------------------------------------------------------------
@each("size, full, half", [  # `lpips` 0.1.4, net="vgg", these made-up weights
    (16, (0.1871566, 0.1784239), (0.0124521, 0.0127265)),
    (28, (0.1876252, 0.1908308), (0.0185277, 0.0183998)),
    (64, (0.2209063, 0.2215153), (0.0077685, 0.0077767))])
def test_lpips_equals_the_lpips_package(vgg, size, full, half):
    """Distances of two waves, and of a wave to its paler copy, are those of the package."""
    k = torch.arange(6 * size ** 2, dtype=torch.float64).view(2, 3, size, size)
    x, y = (0.3 * k).sin().float(), (0.05 * k + 1).cos().float()
    lpips = ldm.LPIPS(ldm.LPIPS_WEIGHTS, vgg)
    assert lpips(x, y).tolist() == pytest.approx(full, abs=1e-4)
    assert lpips(0.5 * x, x).tolist() == pytest.approx(half, abs=1e-5)

def test_lpips_trains_x_alone_and_takes_grey_and_flat_images(vgg):
    """No gradient goes to y, none is NaN; grey is three equal channels, all are float32."""
    lpips, (x, y) = ldm.LPIPS(ldm.LPIPS_WEIGHTS, vgg), torch.randn(2, 3, 1, 16, 16).unbind()
    distance = lpips(x.requires_grad_(), y.requires_grad_())
    close(distance, lpips(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
    distance.sum().backward()
    assert distance.shape == (3,) and x.grad.abs().max() > 0 and y.grad is None
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training
    with torch.autocast("cpu", torch.bfloat16):  # squares of half precision overflow
        assert all(f.dtype == torch.float32 for f in lpips.features(x))
    for dead in (False, True):  # biases may silence every feature
        weights = {k: v - 1e3 * (dead and v.dim() == 1) for k, v in vgg.items()}
        x = torch.zeros(1, 3, 16, 16, requires_grad=True)
        distance = ldm.LPIPS(ldm.LPIPS_WEIGHTS, weights)(x, x.detach() + dead)
        distance.sum().backward()
        assert distance.item() == 0 and x.grad.isfinite().all()

@each("kind", ["missing", "other", "cut", "page", "empty", "code"])
@each("name", ["w.pth", "hub/checkpoints/vgg16-397923af.pth"])
def test_missing_and_wrong_weights_of_lpips_are_named(monkeypatch, name, kind):
    """A sentence without torch's lines and advice names the file, here or in torch.hub's folder."""
    offline = Mock(side_effect=OSError("no route\nto host, see weights_only"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.delattr(models.VGG16_Weights, "get_state_dict")  # the real one again
    monkeypatch.setenv("TORCH_HOME", os.getcwd())
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    if kind != "missing":
        Path(name).write_bytes(wrong_files(ldm.LPIPS_WEIGHTS.read_bytes())[kind])
    with pytest.raises(FileNotFoundError, match=name) as caught:
        ldm.LPIPS(name if name == "w.pth" else ldm.LPIPS_WEIGHTS)
    message = str(caught.value)
    assert "delete the second" in message and "weights_only" not in message and "\n" not in message
    assert not Path("trap").exists()

# ---- 4. PatchGAN --------------------------------------------------------------------------------
@each("kind, g, d", [
    ("bce", sum(math.log(1 + math.exp(-s)) for s in (0.25, 3)) / 2,  # -log(sigmoid(s))
     sum(math.log(1 + math.exp(-s)) for s in (0.5, -2, -0.25, -3)) / 4),
    ("lsgan", (0.75 ** 2 + 2 ** 2) / 2, (0.5 ** 2 + 3 ** 2 + 0.25 ** 2 + 3 ** 2) / 4),
    ("hinge", -(0.25 + 3) / 2, (0.5 + 3 + 1.25 + 4) / 4)])
def test_gan_losses_equal_their_formulas(kind, g, d):
    """Each kind of loss has the value of its formula for two real and two made images."""
    real, fake = torch.tensor([0.5, -2.0]), torch.tensor([0.25, 3.0])
    assert float(ldm.generator_loss(kind, fake)) == pytest.approx(g, rel=1e-5)
    assert float(ldm.discriminator_loss(kind, real, fake)) == pytest.approx(d, rel=1e-5)

@each("channels", [1, 3])
def test_discriminator_has_the_layers_and_patches_of_its_comments(channels):
    """A score is for a patch of 46x46 pixels, and there are H // 8 + 1 of them on each side."""
    disc = ldm.PatchGAN(channels)
    kinds = [type(m).__name__ for m in disc.net]
    assert kinds == ["Conv2d", "LeakyReLU", *2 * ["Conv2d", "BatchNorm2d", "LeakyReLU"], "Conv2d"]
    x = torch.randn(1, channels, 96, 64, requires_grad=True)
    scores = shaken(disc).eval()(x)  # eval: BatchNorm mixes the patches of a batch
    scores[0, 0, 6, 4].backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert [int(seen.any(dim).sum()) for dim in (0, 1)] == [46, 46]
    assert scores.shape == (1, 1, 13, 9)

# ---- 5. Noise scheduler -------------------------------------------------------------------------
def alpha_sigma(t):
    """sqrt(abar_t) and sqrt(1 - abar_t) from the definition of abar; t = -1 is clean."""
    beta = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=torch.float64) ** 2
    abar = float((1 - beta[:t + 1]).prod())
    return abar ** 0.5, (1 - abar) ** 0.5

def test_alpha_and_sigma_are_the_schedule_and_timesteps_lead_to_clean():
    """T steps end with index -1, clean; fewer are evenly spaced, each from the end of the last."""
    s = ldm.NoiseScheduler()
    assert s.T == 1000 and not s.state_dict()  # the table on the device is made anew
    expected = torch.tensor([alpha_sigma(t) for t in (*range(1000), -1)])
    close(torch.tensor([s.alpha, s.sigma]).T, expected, atol=0, rtol=1e-6)
    for steps in (1, 2, 7, 20, 1000):
        starts, ends = zip(*s.timesteps(steps))
        assert (len(starts), starts[0], ends[-1]) == (steps, 999, -1) and starts[1:] == ends[:-1]
        gaps = [t - t_next for t, t_next in zip(starts, ends)]
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1

@each("target", ["eps", "v"])
def test_prediction_target_inverts_to_z0_and_eps(target):
    """z0_and_eps takes back what add_noise did, at each step of a mixed batch, without a clamp."""
    s, (z0, eps) = ldm.NoiseScheduler(target=target), torch.randn(2, 5, 4, 8, 8)
    z0, steps = 3 * z0, [0, 1, 500, 998, 999]
    z_t = s.add_noise(z0, eps, torch.tensor(steps))
    answer = s.target_of(z0, eps, torch.tensor(steps))
    for i, t in enumerate(steps):
        alpha, sigma = alpha_sigma(t)
        v = alpha * eps[i] - sigma * z0[i]
        close(z_t[i], alpha * z0[i] + sigma * eps[i], atol=1e-4, rtol=0)
        close(answer[i], eps[i] if target == "eps" else v, atol=1e-4, rtol=0)
        close(s.z0_and_eps(answer[i], z_t[i], t), (z0[i], eps[i]), atol=1e-3, rtol=0)

def test_ddpm_and_dpm_steps_equal_the_published_formulas():
    """DDPM draws by Bayes' rule (neighbours: Eq. 7); DPM-Solver++(2M) starts, ends as DDIM."""
    s, (z0, z_t, other) = ldm.NoiseScheduler(), torch.randn(3, 1, 1, 4, 4).double()
    for t, t_next in ((999, 998), (500, 499), (1, 0), (999, 900), (400, 20)):
        abar, abar_next = alpha_sigma(t)[0] ** 2, alpha_sigma(t_next)[0] ** 2
        a = abar / abar_next
        precision = a / (1 - a) + 1 / (1 - abar_next)  # of likelihood and prior
        mean = (a ** 0.5 / (1 - a) * z_t + abar_next ** 0.5 / (1 - abar_next) * z0) / precision
        close(s.ddpm_step(z0, z_t, t, t_next, other), mean + other * precision ** -0.5)
    (alpha_b, sigma_b), (alpha, sigma), (alpha_t, sigma_t) = map(alpha_sigma, (950, 900, 800))
    h = math.log(alpha_t / sigma_t) - math.log(alpha / sigma)
    r = (math.log(alpha / sigma) - math.log(alpha_b / sigma_b)) / h
    second = (1 + 1 / (2 * r)) * z0 - 1 / (2 * r) * other
    for previous, D in (((950, other), second), (None, z0)):
        expected = sigma_t / sigma * z_t - alpha_t * (math.exp(-h) - 1) * D
        close(s.dpm_step(z0, z_t, 900, 800, previous), expected)
    close(s.dpm_step(z0, z_t, 30, -1, (60, other)), z0)

# ---- 6. UNet ------------------------------------------------------------------------------------
def test_sinusoids_tell_all_steps_apart():
    """The code of each step has the same length and is far from that of any other."""
    codes = ldm.sinusoids(torch.arange(1000), 32)
    close(codes.square().sum(1), torch.full((1000,), 16.0))  # sin^2 + cos^2
    assert (torch.cdist(codes, codes) + 9 * torch.eye(1000)).min() > 0.1

@each("channels, widths, downs, layers, side", [
    (4, (16, 24), 1, 1, (8, 8)), (3, (8, 16, 32), 2, 2, (8, 16)), (1, (8, 16, 24), 0, 1, (7, 5))])
def test_unet_knows_t_and_each_latent_alone_and_uses_all(channels, widths, downs, layers, side):
    """A new UNet predicts a bias; then t and all weights matter, and skips lead past the middle."""
    unet, z = ldm.UNet(channels, widths, downs, layers), torch.randn(3, channels, *side)
    assert unet(z, torch.tensor([0, 5, 999])).std((0, 2, 3)).max() < 1e-6
    shaken(unet)
    early, late = (unet(z, torch.full((3,), t)) for t in (5, 800))
    assert early.shape == z.shape and (early - late).abs().mean() > 1e-3
    mixed = unet(z, torch.tensor([5, 800, 800]))
    close(mixed, torch.cat([early[:1], late[1:]]), atol=1e-5, rtol=1e-4)
    attentions = [m for m in unet.modules() if isinstance(m, ldm.Attention)]
    assert len(attentions) == layers * (2 * len(widths) - 1)
    mixed.square().mean().backward()
    assert all(p.grad.any() for p in unet.parameters())
    unet.zero_grad()
    unet.mid.register_forward_hook(lambda mid, args, output: torch.randn_like(output))
    unet(z, torch.tensor([5, 800, 800])).square().mean().backward()
    still = {name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()}
    cut_off = ("mid.", f"down_blocks.{len(widths) - 2}.")
    assert still and all(name.startswith(cut_off) for name in still)

@each("side, smallest", [(32, 4), (8, 4), (7, 7), (6, 6), (12, 6)])
def test_unet_halves_latents_to_four_if_it_can(side, smallest, monkeypatch):
    """The UNet of build_ldm halves an even side as long as four or more are left."""
    seen = spy(monkeypatch, ldm.MidBlock, "forward")
    ae_cfg = ldm.AEConfig(size=2 * side, widths=(8, 8), z_channels=1)
    model = ldm.build_ldm(ldm.LDMConfig(widths=(8,) * 5, layers=1, target="eps"), None, ae_cfg)
    model.ema_unet(torch.zeros(1, *model.z_shape), torch.tensor([3]))
    assert seen[0][1].shape[2:] == (smallest, smallest)
    assert model.z_shape == (1, side, side) and model.scheduler.target == "eps"

# ---- 7. Latent diffusion ------------------------------------------------------------------------
def toy_ldm(side, target="v", answer=None, scale=1.0, D=1):
    """A LatentDiffusion of latents (D, side, side); its images are latents times scale."""
    ae = nn.Identity()
    ae.decode = ae.forward
    unet = ldm.UNet(D, (16, 16), downs=int(side % 2 == 0), layers=1)
    model = ldm.LatentDiffusion(ae, unet, ldm.NoiseScheduler(target=target), (D, side, side))
    for net in (model.ema_unet, model.early_unet):
        shaken(net).forward = answer or net.forward
    model.std.fill_(scale)
    return model

def oracle(target, mean, std):
    """The best UNet if each latent value is N(mean, std^2), independent of the others."""
    def answer(z_t, t):
        alpha, sigma = alpha_sigma(int(t[0]))
        away = (z_t - alpha * mean) / (alpha ** 2 * std ** 2 + sigma ** 2)
        z0, eps = mean + alpha * std ** 2 * away, sigma * away
        return eps if target == "eps" else alpha * eps - sigma * z0
    return answer

@each("sampler", ["ddpm", "ddim", "dpm"])
@each("target", ["eps", "v"])
@each("steps", [1, 2, 7, 50])
def test_samplers_return_exactly_z0_from_the_true_noise(sampler, target, steps):
    """A perfect prediction leaves no noise behind, for any number of steps."""
    z0 = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)
    images = toy_ldm(4, target, oracle(target, z0, 0.0)).sample(2, 0, sampler, steps)
    close(images, z0.expand(2, -1, -1, -1), atol=1e-4, rtol=0)

@each("std", [0.7, 2.0])
@each("sampler, steps", [("ddpm", 1000), ("ddim", 200), ("dpm", 60)])
def test_samplers_reproduce_mean_and_deviation_of_gaussian_data(sampler, steps, std):
    """Samples are spread as data N(0.3, std^2) are, whose best prediction is known."""
    # Finitely many steps lose up to 3 % of the deviation, 16384 values tell the mean to 0.03.
    x = 100 * toy_ldm(32, "v", oracle("v", 0.3, std), 0.01).sample(16, 0, sampler, steps)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.05)
    assert float(x.std()) == pytest.approx(std, rel=0.03)

@each("sampler", ["ddpm", "ddim", "dpm"])
def test_autoguidance_moves_away_from_the_early_unet_that_nothing_else_asks(monkeypatch, sampler):
    """Images lie beyond those of a UNet that knows 0.3, away from its young self's, of 0.1."""
    model = toy_ldm(4, answer=oracle("v", 0.3, 0.0))
    z0, eps = torch.full((3, 1, 4, 4), 0.3), torch.randn(3, 1, 4, 4)
    z_t = model.scheduler.add_noise(z0, eps, torch.full((3,), 400))
    close(model.denoise(z_t, 400), (z0, eps), atol=1e-4, rtol=0)  # for any latent in the batch
    model.early_unet.forward = oracle("v", 0.1, 0.0)
    calls = [spy(monkeypatch, net, "forward") for net in (model.ema_unet, model.early_unet)]
    for given, value, asked in (([], 0.4, 3), ([0.0], 0.1, 6), ([1], 0.3, 6), ([1.5], 0.4, 9)):
        images = model.sample(1, 0, sampler, 3, 64, None, *given)
        close(images, torch.full((1, 1, 4, 4), value), atol=1e-4, rtol=0)
        assert len(calls[1]) == asked
    assert len(calls[0]) == 4 * 3

def test_latents_are_normalised_and_taken_back_before_decoding():
    """z0 has mean 0 and deviation 1 per channel, also of half precision or flat, decode clamps."""
    model, other = toy_ldm(8, D=3), toy_ldm(8, D=3)
    z = torch.randn(50, 3, 8, 8) * torch.tensor([0.1, 0.02, 0])[:, None, None] + 0.3
    model.measure(z.half())
    z0 = model.normalise(z.half())
    std, mean = torch.std_mean(z0[:, :2], (0, 2, 3))
    assert mean.abs().max() < 1e-4 and (std - 1).abs().max() < 1e-4 and z0.isfinite().all()
    close(model.decode(z0), z.half().float())
    assert model.decode(z0 + 1e3).max() == 1
    other.load_state_dict(model.state_dict())  # holds what was measured, and three networks
    assert torch.equal(other.sample(2, steps=2), model.sample(2, steps=2))

@each("sampler", ["ddpm", "ddim", "dpm"])
def test_sampled_image_does_not_depend_on_n_or_batch_and_hardly_on_precision(sampler):
    """Image i is the same in any company, autocast only in the UNet; other seeds are others."""
    def note_autocast(*_):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
    model, seen = toy_ldm(8, scale=0.1), []
    x = model.sample(5, 3, sampler, 4, batch=2)
    assert x.shape == (5, 1, 8, 8) and not x.requires_grad
    close(x[:3], model.sample(3, 3, sampler, 4), atol=1e-4, rtol=0)
    images = torch.cat([x, model.sample(2, 4, sampler, 4)]).flatten(1)
    assert (torch.cdist(images, images) + torch.eye(7)).min() > 0.1
    model.ema_unet.register_forward_pre_hook(note_autocast)
    half, full = (model.sample(2, steps=2, dtype=dtype) for dtype in (torch.bfloat16, None))
    assert seen == [torch.bfloat16, torch.bfloat16, False, False]
    close(half, full, atol=0.05, rtol=0)

def test_trace_and_progress_are_told_of_each_step(monkeypatch):
    """An entry is z_t and z0 of four images, DDIM leads to the next one, and images stay."""
    model, trace, told = toy_ldm(4, scale=0.1), [], spy(monkeypatch, ldm, "progress")
    images = model.sample(12, 0, "ddim", 5, batch=5, trace=trace)
    assert torch.equal(images, model.sample(12, 0, "ddim", 5, batch=5, progress=ldm.progress))
    expected = [(3, "sampling, batch"), *[(5, "denoising, step")] * 3]
    assert [(len(items), label) for items, label in told] == expected
    assert [(len(z_t), len(z0)) for z_t, z0 in trace] == [(4, 4)] * 5
    first = [torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    close(trace[0][0], torch.stack(first), rtol=0, atol=0)
    steps = model.scheduler.timesteps(5)
    for (t, t_next), (z_t, z0), (z_next, _) in zip(steps, trace, trace[1:]):
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(t), alpha_sigma(t_next)
        eps = (z_t - alpha * z0) / sigma
        close(z_next, alpha_next * z0 + sigma_next * eps, atol=1e-3, rtol=1e-3)
    close(model.decode(trace[-1][1]), images[:4])

@each("wishes, word", [(dict(sampler="DDIM"), "DDIM.*ddpm.*ddim.*dpm"),
                       *((dict(steps=n), f"{n} .*1 to 50") for n in (-1, 0, 51))], ids=str)
def test_impossible_wishes_are_refused(wishes, word):
    """A sampler, number of steps, target or GAN loss that does not exist is a short error."""
    model = toy_ldm(4)
    model.scheduler = ldm.NoiseScheduler(50)
    with pytest.raises(ValueError, match=word):
        model.sample(1, **wishes)
    with pytest.raises(ValueError, match="x0.*eps.*v"):
        ldm.NoiseScheduler(target="x0")
    pytest.raises(KeyError, ldm.generator_loss, "wgan", torch.zeros(2))

# ---- 8. Settings and optimisers ------------------------------------------------------------------
def test_settings_are_default_then_preset_then_given():
    """What the user gives wins over the data set's preset, which wins over the default."""
    cfg = ldm.resolve(ldm.AEConfig, dict(data="mnist", widths=[8, 8]))
    assert (cfg.widths, cfg.size, cfg.gan) == ((8, 8), 28, "hinge")
    toy = ldm.resolve(ldm.AEConfig, dict(data="toyfaces"))
    assert cfg.perceptual_weight == toy.perceptual_weight == 0  # without a download
    assert not cfg.flip and not ldm.resolve(ldm.LDMConfig, dict(data="mnist")).flip
    assert ldm.resolve(ldm.AEConfig, dict(data="/a/photos/x/..")).out == str(Path("runs", "photos"))
    for amp, dtype in (("auto", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert ldm.pick_device(ldm.RunConfig(amp=amp)) == (torch.device("cpu"), dtype)

@each("cls", [ldm.AEConfig, ldm.LDMConfig, ldm.SampleConfig, ldm.RunConfig])
def test_every_setting_takes_right_values_and_refuses_wrong_ones(cls):
    """A wrong type or choice, or a number out of range or not finite, is refused by its flag."""
    for f in [f for f in fields(cls) if f.metadata]:
        low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
        if f.type is tuple:
            wrong = [(), 8, (8,), (6, 12), (8, -4), (0, 0), "88", (8.0, 16.0), None]
        elif choices or f.type is bool:
            wrong = ["L1", "DDIM", "x0", "CPU", "no", "", 2, 1.5, None]
        elif f.type is str:
            wrong = [""]
        else:
            wrong = [low - 1, low / 2 - 1e-9, 10 * high, "7", math.nan, math.inf,
                     *[1.5, True] * (f.type is int), *[None] * (f.default is not None)]
        for value in wrong:
            with refused(match=f"--{f.name.replace('_', '-')} "):
                print("taken:", value, ldm.resolve(cls, {f.name: value}))
        for value in choices:
            assert getattr(ldm.resolve(cls, {f.name: value}), f.name) == value

def test_paths_and_numbers_of_any_kind_train_and_load(faces, monkeypatch):
    """The ~ of --data=~/x is expanded; Path, numpy and lists become what a checkpoint can hold."""
    monkeypatch.setenv("HOME", os.getcwd())
    shutil.copytree(faces, "in")
    Path("up").symlink_to("in")
    given = dict(data=Path("~/in"), out=Path("~/new"), data_root="~", size=np.int32(16),
                 widths=[np.int64(8), 16], lr=np.float32(2e-3), flip=np.bool_(False), gan_weight=0)
    cfg = ldm.resolve(ldm.AEConfig, TINY["ae"] | given | dict(ae=np.str_("kl")))
    types = {type(value) for value in (*vars(cfg).values(), *cfg.widths)}
    assert types == {str, int, float, bool, tuple, type(None)}
    assert [cfg.data, cfg.out, cfg.data_root] == list(map(os.path.abspath, ("in", "new", ".")))
    ldm.train_ae(cfg)
    command("train-ldm", "--data=~/in", "--out=~/new", *words(TINY["ldm"]))
    assert ldm.load_ldm(Path("new/ldm.pt")).sample(1).shape == (1, 3, 16, 16)
    assert ldm.load_autoencoder("new/ae.pt", "cpu")[1].ae == "kl"
    for data, folder, word in (("~/in", "~/in/", "mix"), ("~/in", "~/in/deep/run", "mix"),
                               ("~/up", "in/run", "mix"), ("~/in/samples", "in", "mix"),
                               ("celebhq", "celebhq/a", "mix"), ("~/in", __file__, "no folder")):
        with refused(match=f"--out .*{word}"):
            ldm.resolve(ldm.AEConfig, given | dict(data=data, out=folder))
    monkeypatch.setattr(Path, "exists", Mock(return_value=False))  # as on a drive that is gone
    with refused(match="no folder"):
        ldm.resolve(ldm.AEConfig, given | dict(out="gone"))

@each("steps", [1, 9, 3000, 100000])
def test_learning_rate_rises_stays_and_falls_to_nothing(steps):
    """It is at its highest for about half of the training, and never 0 or above lr."""
    rates = [ldm.learning_rate(ldm.AEConfig(steps=steps, lr=2.0), s) for s in range(1, steps + 1)]
    top = [i for i, rate in enumerate(rates) if rate == 2]
    assert rates == sorted(rates[:top[0]]) + [2.0] * len(top) + sorted(rates[top[-1] + 1:])[::-1]
    assert min(rates) > 0 and max(rates) <= 2
    if steps > 1000:
        assert top[0] < 500 and 0.4 < len(top) / steps < 0.6 and max(rates[::steps - 1]) < 0.02

def test_gradients_are_unscaled_then_clipped_and_the_average_of_weights_warms_up():
    """With fp16's factor of 1024, norm 0.5 moves a weight by 0.5 lr, norm 100 by lr, inf not."""
    net, scaler = nn.PReLU(), torch.amp.GradScaler("cpu", init_scale=1024.0)  # of one weight
    optimiser = torch.optim.SGD(net.parameters(), lr=9.0)
    for slope, moved in ((0.5, 0.05), (100, 0.1), (math.inf, 0)):
        before = net.weight.item()
        scaler.scale(slope * net.weight.sum()).backward()
        ldm.optimise(scaler, optimiser, net, 0.1)
        scaler.update()
        assert before - net.weight.item() == pytest.approx(moved, abs=1e-6)
        assert net.weight.grad is None
    for step, decay in ((0, 0.1), (90, 0.91), (10 ** 6, 0.995)):
        ema, model = nn.PReLU(init=1.0), nn.PReLU(init=0.0)
        ldm.update_ema(ema, model, step)
        assert ema.weight.item() == pytest.approx(decay) and model.weight.item() == 0

@each("layer", [nn.Linear(40, 12), nn.Conv2d(10, 12, 2), nn.Conv2d(3, 40, 2)])
def test_muon_makes_all_directions_alike_and_leaves_the_rest_to_adam(layer):
    """Singular values become 0.7 to 1.2, codes move by lr, and with an infinite loss all stays."""
    net = nn.ModuleList([layer, nn.Embedding(5, 2)])
    muon, scaler = ldm.Muon(net, (0.9, 0.99)), torch.amp.GradScaler("cpu", init_scale=8.0)
    U, V = (torch.linalg.qr(torch.randn(n, 12))[0] for n in layer.weight.flatten(1).shape)
    G = (U @ torch.logspace(-2, 0, 12).diag() @ V.T).view_as(layer.weight)
    w, _, codes = before = [p.detach().clone() for p in net.parameters()]
    for factor in (math.inf, 1):
        assert all(map(torch.equal, before, net.parameters()))
        loss = (layer.weight * G).sum() + layer.bias.sum() + net[1].weight.sum()
        scaler.scale(factor * loss).backward()
        ldm.optimise(scaler, muon, net, 0.01)
        scaler.update()
    values = U.T @ (w - layer.weight).flatten(1) @ V / (0.4 * 0.01 * 40 ** 0.5)
    close(values, values.diag().diag(), atol=0.01, rtol=0)
    assert values.diag().min() > 0.65 and values.diag().max() < 1.25
    close(codes - net[1].weight, torch.full((5, 2), 0.01))

# ---- 9. Stage 1, and what both stages share -----------------------------------------------------
@each("stage, net, term, settings", [
    ("ae", "ae", "recon", {}), ("ae", "ae", "recon", dict(ae="kl", amp="bf16")),
    ("ae", "ae", "recon", dict(channels=1, amp="fp16", steps=40)),
    ("ldm", "unet", "loss", dict(target="eps")), ("ldm", "unet", "loss", dict(amp="fp16"))])
def test_both_stages_learn(train, stage, net, term, settings):
    """The loss falls within 60 steps, and half precision does not get into the weights."""
    ckpt = train(stage, log_every=20, **dict(steps=60) | settings)
    assert ckpt["log"][-1][term] < 0.85 * ckpt["log"][0][term]
    assert all(w.dtype == torch.float32 for w in ckpt["parts"][net].values())

@each("settings", [dict(flip=True), dict(flip=False), dict(flip=True, data="toyfaces")], ids=str)
def test_stage_1_sees_the_training_images_and_no_others(train, monkeypatch, settings):
    """No held-out image is seen, all others are; with --flip each is mirrored on its own."""
    monkeypatch.setattr(ldm, "toyfaces", Mock(return_value=ldm.toyfaces(range(1000), 16)))
    seen = spy(monkeypatch, ldm.VQVAE, "forward")
    cfg = ldm.AEConfig(**train("ae", steps=10, batch=100, **settings)["config"])
    images, held = [ldm.to_float(part, "cpu") for part in ldm.load_images(cfg)[:2]]
    batches, upright = [keys(x) for _, x in seen], keys(images)
    got, allowed = set().union(*batches), upright | (keys(images.flip(3)) if cfg.flip else set())
    assert got <= allowed and not got & keys(held)
    assert got == allowed or cfg.data == "toyfaces"
    assert not cfg.flip or all(0 < len(batch & upright) < len(batch) for batch in batches)

@each("stage, owner, name", [("ae", ldm.VQVAE, "forward"),
                             ("ldm", ldm.NoiseScheduler, "add_noise")])
def test_every_batch_is_another_one(train, monkeypatch, stage, owner, name):
    """Batches differ by step, within --accum, and by seed; the same seed repeats all."""
    seen = spy(monkeypatch, owner, name)
    monkeypatch.setattr(ldm, "held_out_loss", Mock(return_value=torch.zeros(())))  # it adds noise
    for folder, seed in (("a", 0), ("b", 1), ("c", 0)):
        train(stage, folder, accum=2, seed=seed)
    batches = [[x.numpy().tobytes() for x in args[1:]] for args in seen]
    assert len(batches) == 24 and batches[:8] == batches[16:]
    for kind in zip(*batches[:16]):  # images; or latents, noise and t
        assert len(set(kind)) == 16

def test_held_psnr_is_that_of_the_checkpoint_on_held_out_images(train):
    """The log and the picture show the held-out images as the saved autoencoder makes them."""
    ckpt = train("ae", steps=30, log_every=30)
    ae, cfg = ldm.load_autoencoder(Path("new/ae.pt"), "cpu")
    x = ldm.to_float(ldm.load_images(cfg)[1], "cpu")
    z = ae.encode(x)
    mse = (ae.decode(z).clamp(-1, 1) - x).square().mean((1, 2, 3))
    assert abs(ckpt["log"][-1]["held_psnr"] - float(10 * (4 / mse).log10().mean())) < 1e-3
    rows = np.asarray(ldm.image_grid(torch.cat([x, ae.decode(z), ldm.latent_picture(z, x)]), 4))
    assert np.abs(pixels("new/pictures/ae-000030.png") - rows).max() <= 1
    assert abs(ckpt["log"][-1]["z_std"] - z.std()) < 1e-3 and not z.requires_grad
    assert ldm.psnr(x, x).isfinite().all()

@pytest.fixture
def first_gradient(train, monkeypatch):
    """first_gradient(stage, optimisers, **settings), up to a factor, without chance or clipping."""
    def run(stage, optimisers, **settings):
        parts = train(stage, f"run{len(os.listdir())}", steps=1, **settings)["parts"]
        states = [state for opt in optimisers for state in parts[opt]["state"].values()]
        return torch.cat([state["exp_avg"].flatten() for state in states])
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.full(size, high // 2))
    monkeypatch.setattr(torch, "multinomial", lambda p, n, **_: torch.full([n], len(p) // 2))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(size))
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", Mock())
    return run

@each("kind, term, unit", [("vq", "codebook", 1), ("vq", "commit", 1), ("kl", "kl", 1),
                           ("kl", "perceptual", 1), ("kl", "gan", 1000)])  # a ramp
def test_each_weight_scales_its_gradient(first_gradient, monkeypatch, kind, term, unit):
    """Ten times the weight is ten times the gradient; the GAN's falls with the learning rate."""
    off = dict(ae=kind, codebook_weight=0, commit_weight=0, kl_weight=0, disc_start=0)
    def gradient(weight, rate=1):
        monkeypatch.setattr(ldm, "learning_rate", lambda cfg, step: rate * cfg.lr)
        return first_gradient("ae", ["opt"], **off | {f"{term}_weight": weight})
    none, one, ten = gradient(0), gradient(unit), gradient(10 * unit, rate=0.5)
    times = 5 if term == "gan" else 10
    assert 1e-6 < (one - none).norm() < 100
    assert (ten - none - times * (one - none)).norm() < 1e-2 * (ten - none).norm()

@each("stage, optimisers, settings", [("ae", ["opt", "opt_d"], GAN | dict(disc_start=0)),
                                      ("ldm", ["opt"], {})])
def test_accumulated_gradients_are_averaged(first_gradient, stage, optimisers, settings):
    """Three times the same batch gives the gradient of one, also for the discriminator."""
    once, thrice = (first_gradient(stage, optimisers, accum=n, **settings) for n in (1, 3))
    assert once.abs().max() > 1e-3
    close(once, thrice, atol=1e-6, rtol=1e-3)

@each("recon, value", [("l1", 0.3), ("l2", 0.09)])
def test_reconstruction_loss_is_the_mean_error_and_codes_restart(train, monkeypatch, recon, value):
    """Of images 0.3 too bright l1 is 0.3, l2 its square; restarts are once per hundred steps."""
    def forward(self, x):
        return x + 0.3 + 0 * self.decoder[0].bias.sum(), {}
    calls = spy(monkeypatch, ldm.VectorQuantizer, "restart")
    monkeypatch.setattr(ldm.VAE, "forward", forward)
    (row,) = train("ae", ae="kl", recon=recon, steps=1)["log"]
    assert row["recon"] == pytest.approx(value, rel=1e-4)
    train("ae", "b", accum=2, batch=1, steps=102, log_every=102)  # twice would move used codes
    assert [len(z_e) for _, z_e in calls] == [1, 1]

@each("learner", ["discriminator", "autoencoder"])
def test_each_side_of_the_gan_gets_better_alone(train, monkeypatch, learner):
    """D(fake) nears 0 (2/3 if the generator's gradient stayed in it); G raises the scores."""
    def only_one(scaler, optimiser, net, lr):
        if isinstance(net, ldm.PatchGAN) == (learner == "discriminator"):
            optimise(scaler, optimiser, net, lr)
        optimiser.zero_grad()
    optimise = ldm.optimise
    monkeypatch.setattr(ldm, "optimise", only_one)
    log = train("ae", **GAN, disc_start=0, gan="lsgan", steps=60, log_every=10)["log"]
    if learner == "discriminator":
        assert abs(log[-1]["score_fake"]) < 0.3 and log[-1]["score_real"] > 0.7
    else:
        assert log[-1]["score_fake"] > log[0]["score_fake"] + 0.1

@each("steps, settings", [(4, dict(disc_start=2)), (8, {})])
def test_gan_joins_in_after_disc_start_or_a_quarter(train, capsys, steps, settings):
    """Without --disc-start it joins in after a quarter of --steps; when is said at the start."""
    ckpt = train("ae", **GAN, **settings, steps=steps, log_every=1)
    assert ["gan" in row for row in ckpt["log"]] == [False] * 2 + [True] * (steps - 2)
    assert re.search("no GPU was found.*joins in after step 2\n", capsys.readouterr().out, re.S)
    assert ckpt["parts"]["opt_d"]["state"][0]["step"] == steps - 2
    for opt in ("opt", "opt_d"):
        (group,) = ckpt["parts"][opt]["param_groups"]
        assert (group["lr"], group["betas"]) == (TINY["ae"]["lr"] * 2 / steps, (0.5, 0.9))

def test_pictures_of_one_colour_train_without_nan(train):
    """Stages, samples and figures stay finite; eval finds the pictures from any folder."""
    Path("flat").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), "red").save(f"flat/{i}.png")
    train("ae", data="flat")  # it saves nothing if its log has a NaN
    train("ldm", data="flat")
    os.chdir("flat")
    assert all(map(math.isfinite, figures("../new").values())) and not Path("data").exists()

# ---- 10. Stage 2 --------------------------------------------------------------------------------
def latents(model, flip):
    """The latents that stage 2 should learn from, encoded 20 at a time, and the held-out ones."""
    parts = [ldm.to_float(part, "cpu") for part in ldm.load_images(model.ae_cfg)[:2]]
    parts[0] = torch.cat([parts[0], parts[0].flip(3)] if flip else parts[:1])
    return [torch.cat([model.ae.encode(x) for x in part.split(20)]) for part in parts]

@each("flip, target, mean", [(True, "v", 272), (False, "eps", 500)])
def test_unet_learns_from_normalised_latents_with_noise(train, monkeypatch, flip, target, mean):
    """It gets all 36 images, with --flip also mirrored. v draws t like alpha, eps evenly."""
    seen = spy(monkeypatch, ldm.NoiseScheduler, "add_noise")
    monkeypatch.setattr(ldm, "held_out_loss", Mock(return_value=torch.zeros(())))  # it adds noise
    train("ldm", batch=200, flip=flip, target=target)
    n, model = 72 if flip else 36, ldm.load_ldm("new/ldm.pt")
    _, *parts = zip(*seen)
    z0, eps, t = map(torch.cat, parts)
    assert len(keys(z0)) == n
    expected = model.normalise(latents(model, flip)[0])
    assert torch.cdist(z0.flatten(1), expected.flatten(1)).min(1).values.max() < 0.02  # fp16
    assert len(keys(eps)) == 800 and abs(eps.std() - 1) < 0.02 and abs(eps.mean()) < 0.02
    assert t.min() < 30 and t.max() > 900 and t.float().mean() == pytest.approx(mean, abs=30)

@each("target, flip", [("v", True), ("eps", False)])
def test_loaded_model_is_the_average_that_training_showed(train, monkeypatch, target, flip):
    """It has both averages, frozen, the latents' mean and deviation, and repeats the pictures."""
    calls = spy(monkeypatch, ldm, "update_ema")
    ckpt = train("ldm", target=target, flip=flip, seed=3, steps=10, log_every=1)
    model = ldm.load_ldm("new/ldm.pt", "cpu")
    ae = ldm.load_file(Path("new/ae.pt"), "ae")["parts"]["ae"]
    (ema, net, _), (early, *_), last = calls[-1], calls[1], ckpt["parts"]["unet"]
    for average, steps in ((ema, 10), (early, 2)):  # the weaker one stays behind
        assert [step for a, _, step in calls if a is average] == [*range(1, steps + 1)]
    (group,) = ckpt["parts"]["opt"]["param_groups"]
    assert (group["lr"], group["betas"]) == (TINY["ldm"]["lr"] / 5, (0.9, 0.99))
    for a, b in ((net, last), (model.ema_unet, ema.state_dict()),
                 (model.early_unet, early.state_dict()), (model.ae, ae)):
        close(a.state_dict(), b, rtol=0, atol=0)
    assert not torch.equal(last["conv_in.weight"], model.ema_unet.conv_in.weight)
    assert not any(p.requires_grad for p in model.parameters())
    picture = np.asarray(ldm.image_grid(model.sample(16, 3), 8))
    assert np.abs(pixels("new/pictures/ldm-000010.png") - picture).max() <= 1
    z, held = latents(model, flip)
    std, mean = torch.std_mean(z.half().float(), (0, 2, 3), keepdim=True)
    close([model.mean, model.std], [mean, std], rtol=1e-4, atol=1e-5)
    z0, t = model.normalise(held), torch.tensor([0, 333, 666, 999])
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    pred = model.ema_unet(model.scheduler.add_noise(z0, eps, t), t)
    loss = (pred - model.scheduler.target_of(z0, eps, t)).square().mean((1, 2, 3))
    loss = np.average(loss.detach(), weights=[alpha_sigma(i)[0] ** (target == "v") for i in t])
    assert ckpt["log"][-1]["held_loss"] == pytest.approx(loss, rel=1e-3)
    before = torch.get_rng_state()  # that of training stays as it is
    ldm.held_out_loss(model, z0, None)
    assert torch.equal(before, torch.get_rng_state())

def test_another_autoencoder_needs_another_unet(train, out, monkeypatch, capsys):
    """After more of stage 1 a sentence names ldm.pt, and a stopped stage 1 is warned of."""
    signal_at(monkeypatch, 5)
    pytest.raises(KeyboardInterrupt, train, "ae", "out", steps=8)
    for warned in (["ldm.pt holds", "ae.pt stopped at step 6 of 8"], ["ldm.pt holds"], []):
        with refused(match="ldm.pt was .*different autoencoder"):
            train("ldm", "out", steps=6)
        assert re.findall("warning: out/(.*?)(?: the|. To)", capsys.readouterr().out) == warned
        train("ae", "out", steps=8)
    with refused(match="different size"):  # and not: other pictures
        train("ae", "out", size=32)

# ---- 11. Sampling and evaluation ----------------------------------------------------------------
@each("sampler", ["ddpm", "ddim", "dpm"])
def test_sample_writes_what_it_was_asked_for(out, sampler):
    """Options are obeyed; the grid has 64 images at most, samples/ all, progress.png their way."""
    model = ldm.load_ldm(out / "ldm.pt")
    for n, columns, steps in ((70, 8, 6), (11, 4, 1)):
        trace, given = [], dict(n=n, seed=5, sampler=sampler, steps=steps, batch=9, autoguidance=9)
        images = model.sample(**given, trace=trace)
        command("sample", *words(dict(out=out, save_images=True) | given))
        grid, strip = pixels(out / "samples.png"), pixels(out / "progress.png")
        expected = np.asarray(ldm.image_grid(images[:64], columns))
        assert np.abs(grid - expected).max() <= 1 and len(strip) == 8 * 98 + 2
        assert np.abs(strip[-98:-2, -98:] - grid[2:98, 296:394]).max() <= 1  # the fourth, framed
        x_t, z0 = map(model.decode, trace[0])
        first = torch.cat([ldm.latent_picture(trace[0][0], x_t), x_t, z0])
        assert np.abs(strip[:98] - np.asarray(ldm.image_grid(first, 12))[:98]).max() <= 1
        assert sorted(os.listdir(out / "samples")) == [f"{i:06}.png" for i in range(n)]
        saved = np.stack([pixels(out / f"samples/{i:06}.png") for i in range(n)])
        assert np.abs(saved - (images.permute(0, 2, 3, 1).numpy() + 1) * 127.5).max() <= 1
        assert np.abs(saved[0] - grid[2:98:6, 2:98:6]).max() <= 1  # 16 pixels, times 6

def test_the_newest_run_is_taken_unless_one_is_named():
    """It is the one touched last under runs/; eval also takes one that has only stage 1 yet."""
    for i, name in enumerate(("runs/old/ae", "runs/old/ldm", "runs/new/ldm", "runs/young/ae")):
        path = Path(f"{name}.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9 + i, 1e9 + i))
    newest, old = (ldm.resolve(ldm.SampleConfig, given) for given in ({}, {"data": "old"}))
    assert ldm.find_run(newest, "ldm.pt") == Path("runs/new")
    assert [ldm.find_run(c, "ldm.pt", "ae.pt").name for c in (newest, old)] == ["young", "old"]

def test_frechet_distance_of_known_gaussians():
    """It is zero for equal features, and the closed form for exactly Gaussian moments."""
    x = torch.randn(500, 4, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # mean 0, covariance 1
    (A, B), shift = torch.randn(2, 4, 4, dtype=torch.float64), torch.randn(4).double()
    S_a, S_b = A @ A.T, B @ B.T  # these do not commute
    roots = torch.linalg.eigvals(S_a @ S_b).real.sqrt().sum()
    expected = shift.square().sum() + S_a.trace() + S_b.trace() - 2 * roots
    close(ldm.frechet_distance(x @ A.T + shift, x @ B.T), expected)
    close(ldm.frechet_distance(x, x), 0 * expected, atol=1e-9, rtol=0)

def figures(out, **settings):
    cfg = ldm.resolve(ldm.SampleConfig, dict(out=str(out), n=4, steps=3) | settings)
    return {name: float(value) for name, value in ldm.evaluate(cfg).items()}

def test_eval_obeys_its_settings_and_each_figure_is_what_its_name_says(out, vgg, capsys):
    """All equal those made by hand, and other settings change only that of the samples."""
    table, printed = figures(out, seed=5, sampler="ddim"), capsys.readouterr().out
    model, lpips = ldm.load_ldm(out / "ldm.pt"), ldm.LPIPS(ldm.LPIPS_WEIGHTS, vgg)
    x = ldm.to_float(ldm.load_images(model.ae_cfg)[1], "cpu")
    x_rec = model.ae.decode(model.ae.encode(x)).clamp(-1, 1)
    real, rebuilt, fake = (lpips.features(images)[4].mean((2, 3))  # relu5_3
                           for images in (x, x_rec, model.sample(4, 5, "ddim", 3)))
    assert all(name in printed for name in table)
    assert table == pytest.approx(rel=1e-2, expected={
        "PSNR, dB": -10 * ((x_rec - x).square().mean((1, 2, 3)) / 4).log10().mean().item(),
        "LPIPS": lpips(x_rec, x).mean().item(),
        "FD, reconstructions": ldm.frechet_distance(rebuilt, real).item(),
        "FD, 4 samples (ddim, 3 steps)": ldm.frechet_distance(fake, real).item()})
    tries = ({}, dict(seed=1), dict(sampler="ddpm"), dict(steps=9), dict(n=1), dict(autoguidance=3))
    tables = [list(figures(out, **given).values()) for given in tries]
    assert all(math.isfinite(value) for table in tables for value in table)
    assert len({last for *_, last in tables}) == 6 and len({tuple(t[:-1]) for t in tables}) == 1
    (out / "ldm.pt").unlink()  # then the autoencoder alone, which is said
    assert list(figures(out).values()) == tables[0][:-1]
    assert "only stage 1" not in printed and "only stage 1" in capsys.readouterr().out

# ---- 12. Data -----------------------------------------------------------------------------------
def test_toyfaces_are_all_different_and_pictures_take_back_to_float():
    """Face i is always one, in the colours of the tables; 256 values come back rounded, not cut."""
    x = ldm.toyfaces(range(100), 16)
    assert x.dtype == torch.uint8 and x.shape == (100, 3, 16, 16) and len(keys(x)) == 100
    assert torch.equal(x[7:9], ldm.toyfaces([7, 8], 16))
    assert (F.avg_pool2d(ldm.toyfaces([5], 32).float(), 2)[0] - x[5]).abs().mean() < 3
    assert {tuple(corner.tolist()) for corner in x[:, :, 0, 0]} == set(ldm.BACK)
    x = ldm.to_float(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), "cpu")
    assert x.min() == -1 and x.max() == 1
    for change in (0, -0.3 / 127.5, 0.3 / 127.5):
        picture = np.asarray(ldm.image_grid(x + change, 1))[2:-2, 2:-2, 0]  # without the frame
        assert np.array_equal(picture[::6, ::6].flatten(), np.arange(256)), change

def test_every_kind_of_picture_is_decoded():
    """Palettes, transparency, 1 to 16 bits and odd tags give the right pixels or grey."""
    y, x = np.mgrid[:16, :16] * 17
    a, grey = np.stack([x, y, 255 - x, (x + y) // 2], axis=2).astype(np.uint8), np.uint8(x)
    rgb, three, opaque = a[..., :3], np.repeat(grey[..., None], 3, 2), a[..., 3:] / 255
    palette = Image.fromarray(grey // 64).convert("P")
    palette.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    table = np.array([[255] * 3, [200, 0, 0], [0, 200, 0], [0, 0, 200]])  # index 0: see-through
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)[::-1] // 100 * 100
    text = ldm.PngImagePlugin.PngInfo()
    text.add_text("long", "x" * 3 * 2 ** 20, zip=True)
    for name, image, options, expected in (
            ("one_bit.png", Image.fromarray(grey > 99), {}, (three > 99) * 255),
            ("sixteen_bits.png", Image.fromarray(deep), {}, deep[..., None] / 257 * np.ones(3)),
            ("la.png", Image.fromarray(a[..., [0, 3]]), {}, three * opaque + 255 * (1 - opaque)),
            ("palette.png", palette, {"transparency": 0}, table[grey // 64]),
            ("rgba.png", Image.fromarray(a), {}, rgb * opaque + 255 * (1 - opaque)),
            ("broken_exif.png", Image.fromarray(rgb), {"exif": b"no header"}, rgb),
            ("long_text.png", Image.fromarray(rgb), {"pnginfo": text}, rgb)):
        image.save(name, **options)
        got, light = (ldm.decode_image(name, 16, channels) for channels in (3, 1))
        assert got.dtype == torch.uint8 and got.shape == (16, 16, 3) and light.shape == (16, 16, 1)
        assert np.abs(got.numpy() - expected.astype(float)).max() < 0.6, name  # rounded
        assert np.abs(light[..., 0].numpy() - expected @ [0.299, 0.587, 0.114]).max() < 1.2, name

@each("orientation, turn", [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_photos_of_any_size_come_out_square_and_upright(orientation, turn):
    """They are turned by their tag, their centre is cut out, and the fast way changes little."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = orientation
    noisy = ldm.draw_face(1, 300) + rng.normal(0, 40, (300, 300, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save("a.jpg", exif=exif)
    assert np.array_equal(ldm.decode_image("a.jpg", 300, 3), np.rot90(pixels("a.jpg"), turn))
    whole = ImageOps.fit(Image.open("a.jpg"), (32, 32), Image.Resampling.LANCZOS)
    got = ldm.decode_image("a.jpg", 32, 3).numpy()
    assert np.abs(got - np.rot90(np.asarray(whole, float), turn)).mean() < 1.5
    for w, h in ((1, 1), (5, 301), (301, 5), (48, 32), (1, 4999)):
        picture = rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        Image.fromarray(picture).save("a.png", exif=exif)
        side = min(w, h)
        square = picture[(h - side) // 2:][:side, (w - side) // 2:][:, :side]
        assert np.array_equal(ldm.decode_image("a.png", side, 3), np.rot90(square, turn))

def test_good_files_of_a_folder_are_read_and_others_named(capsys):
    """Odd names are read; torn and fake pictures are said, and what PIL cannot read is counted."""
    Path("in/deep").mkdir(parents=True)
    good = ("deep/with space.png", "ünïcode 顔.png", "new\nline.png", "UPPER.PNG", "a.bmp")
    for i, name in enumerate((*good, "cut.jpg")):
        Image.fromarray(ldm.draw_face(i, 16)).save(f"in/{name}")
    Path("in/cut.jpg").write_bytes(Path("in/cut.jpg").read_bytes()[:300])
    shutil.copy("in/a.bmp", "in/.hidden.bmp")
    shutil.copytree("in/deep", "in/.thumbs")
    Image.fromarray(np.ones((16, 16), np.float32)).save("in/float.tiff")
    for name in ("text.jpg", "notes.txt", "a.heic", "deep/B.HEIC"):
        Path("in", name).write_text("I am no picture")
    Path("in/gone.png").symlink_to("nowhere.png")
    assert keys(ldm.load_folder(Path("in"), 16, 3)) == keys(ldm.toyfaces(range(5), 16))
    lines = capsys.readouterr().out
    for line in ("left out 2 files of type .heic.*convert", "left out 1 files of type .txt",
                 "read it: in/cut.jpg", "read it: in/text.jpg", "in/float.tiff", "in: 5 pictures"):
        assert re.search(line, lines), line
    assert ".png" not in lines and "hidden" not in lines

@each("names", ["", "a.txt", "a.png b.jpg c.bmp", "00.png 01.png", "00.png 01.png c.bmp"])
def test_a_fixed_and_mixed_tenth_is_held_out_of_three_pictures_or_more(faces, monkeypatch, names):
    """No folder, an empty one, one without pictures, or with two that are whole is a mistake."""
    Path("in").mkdir()
    for name in names.split():
        good = faces / name
        Path("in", name).write_bytes(good.read_bytes() if good.exists() else b"no picture")
    for data in ("in", "nowhere"):
        with refused(match=f"--data .*{data}.* pictures"):
            ldm.load_images(ldm.resolve(ldm.AEConfig, dict(data=data, size=16)))
    images = ldm.load_folder(faces, 16, 3)
    assert torch.equal(images, ldm.load_folder(faces, 16, 3))
    last = torch.stack([ldm.decode_image(path, 16, 3) for path in sorted(faces.iterdir())[-4:]])
    assert keys(images[-4:]) != keys(last.permute(0, 3, 1, 2))
    for n, held in ((40, 4), (3, 2), (25, 2), (30000, 1000)):  # two to a thousand
        images = images if n == 40 else images[:1].expand(n, 3, 16, 16)
        monkeypatch.setattr(ldm, "load_folder", Mock(return_value=images))
        *parts, _ = ldm.load_images(ldm.AEConfig(data=str(faces), size=16))
        assert len(parts[1]) == held and torch.equal(torch.cat(parts), images)

def test_links_are_no_trap_and_a_failing_disk_stops_the_reading(faces, monkeypatch):
    """Linked pictures and folders count, no loop is followed; a network disk may work tomorrow."""
    for i in range(8):
        Path(f"in/{i}").mkdir(parents=True)
        Path(f"in/{i}/up").symlink_to(Path("in").absolute())
    for link, target in (("in/a.png", faces / "00.png"), ("in/faces", faces), ("link", faces)):
        Path(link).symlink_to(target)
    assert [len(ldm.load_folder(Path(f), 16, 3)) for f in ("in", "link")] == [1, 40]
    monkeypatch.setattr(ldm, "decode_image", Mock(side_effect=OSError(5, "Input/output error")))
    with refused(match="faces.*png.*Input/output error"):
        ldm.load_folder(faces, 16, 3)

def test_built_in_data_sets_are_found_or_name_their_place(faces, monkeypatch):
    """Of celebhq a folder is searched in --data-root; MNIST has one channel, of any size."""
    cfg = ldm.resolve(ldm.AEConfig, dict(data="celebhq", data_root=".", size=32))
    with refused(match=os.path.join(os.getcwd(), "celebhq")):
        ldm.load_images(cfg)
    Path("celebhq").symlink_to(faces)
    assert [len(x) for x in ldm.load_images(cfg)[:2]] == [36, 4] and cfg.data_root == os.getcwd()
    cfg = replace(cfg, data="mnist", channels=1)
    monkeypatch.setattr(ldm.datasets, "MNIST", None)  # as if there were no internet
    with refused(match=os.path.join(os.getcwd(), "MNIST", "raw")):
        ldm.load_images(cfg)
    digits = SimpleNamespace(data=torch.full((70, 28, 28), 99, dtype=torch.uint8))
    monkeypatch.setattr(ldm.datasets, "MNIST", Mock(return_value=digits))
    assert [x.shape for x in ldm.load_images(cfg)[:2]] == [(63, 1, 32, 32), (7, 1, 32, 32)]
    ldm.datasets.MNIST.assert_called_with(Path.cwd(), download=True)  # not the test set
    with refused(match="--channels 3"):
        ldm.load_images(replace(cfg, channels=3))
    with refused(match="toyfaces: stage 1 was trained on mnist"):  # a forgotten --data
        ldm.load_same_images(ldm.LDMConfig(), cfg)

# ---- 13. Runs -----------------------------------------------------------------------------------
@each("stage, term", [("ae", "recon"), ("ldm", "loss")])
def test_run_folder_has_what_was_asked_for_and_the_log_keeps_no_graph(train, stage, term):
    """Rows every 100 steps (here 2) are means; pictures and curves come every --save-every."""
    ckpt = train(stage, steps=7, save_every=3, accum=2)
    assert ckpt["step"] == ckpt["parts"]["opt"]["state"][1]["step"] == 7  # a bias, Adam's
    assert [row["step"] for row in ckpt["log"]] == [2, 3, 4, 6, 7]
    names = [f"pictures/{stage}-00000{step}.png" for step in (3, 6, 7)]
    assert sorted(map(str, Path("new").glob(f"*/{stage}-*"))) == [f"new/{name}" for name in names]
    for name in (*names, f"{stage}-curves.png"):
        assert len(Image.open(f"new/{name}").convert("L").getcolors()) > 2
    single = train(stage, "b", steps=7, log_every=1, accum=2)["log"]
    means = [single[0][term] + single[1][term], single[3][term] * 2]
    assert [2 * ckpt["log"][i][term] for i in (0, 2)] == pytest.approx(means)
    run, w = ldm.Run(ldm.AEConfig(out="c"), "ae", {}), torch.ones(3, requires_grad=True)
    run.step = 9001  # --steps may be lowered
    assert next(run.steps(), "done") == "done"
    run.add({"loss": w.square().sum()})
    alive = weakref.ref(w)
    del w  # what a loss needs for its gradient is freed
    assert alive() is None

@each("stage, settings", [("ae", dict(accum=2)), ("ae", GAN | dict(disc_start=1)), ("ldm", {}),
    ("ldm", dict(accum=2, target="eps")), ("ldm", dict(amp="fp16"))], ids=str)
def test_stopped_and_resumed_equals_one_go(train, stage, settings, monkeypatch):
    """Two steps, then two more, from one checkpoint, twice, give bit for bit those of four."""
    once, path = train(stage, "once", **settings), Path(f"new/{stage}.pt")
    signal_at(monkeypatch, 1)
    pytest.raises(KeyboardInterrupt, train, stage, **settings)
    older = path.read_bytes()
    for _ in range(2):
        path.write_bytes(older)
        results = [[ckpt["log"], *(part.get("state", part) for part in ckpt["parts"].values())]
                   for ckpt in (once, train(stage, **settings))]  # networks, state of optimisers
        close(*results, rtol=0, atol=0)

def test_handlers_of_signals_are_at_once_and_always_as_before(train, monkeypatch):
    """Also while a notebook still shows a traceback, under nohup, and outside the main thread."""
    before = [signal.getsignal(s) for s in SIGNALS]
    cfg = ldm.AEConfig(**train("ae")["config"] | dict(out="b"))
    assert [signal.getsignal(s) for s in SIGNALS] == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        signal_at(patch, 2)
        signal_at(patch, 2)  # the second one acts at once
        ldm.train_ae(cfg)
    assert [signal.getsignal(s) for s in SIGNALS] == before, caught
    assert not Path("b/ae.pt").exists()
    signal.signal(SIGNALS[2], signal.SIG_IGN)
    signal_at(monkeypatch, 1, SIGNALS[2])
    assert train("ae", "c", steps=3)["step"] == 3
    assert ThreadPoolExecutor().submit(train, "ae", "d").result()["step"] == 4
    signal_at(monkeypatch, 4)  # in the last step, after which demo must not go on
    pytest.raises(KeyboardInterrupt, train, "ae", "e")
    monkeypatch.setattr(ldm, "image_grid", Mock(side_effect=KeyboardInterrupt))
    pytest.raises(KeyboardInterrupt, train, "ldm", "f", steps=3)
    assert Path("f/ldm.pt").exists()  # it is saved before a preview is drawn

@each("number, error", [*zip(SIGNALS, [None, BrokenPipeError(32, "x"), ValueError("x")])])
def test_signals_save_and_no_output_ends_a_training(train, monkeypatch, number, error):
    """Ctrl-C, kill and a closed terminal save one step later; stdout may be closed or odd."""
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=Mock(side_effect=error), flush=Mock()))
    signal_at(monkeypatch, 2, number)
    for stage in ("ae", "ldm"):
        pytest.raises(KeyboardInterrupt, train, stage, steps=8)
        assert ldm.load_file(Path(f"new/{stage}.pt"), stage)["step"] == 3
    command("sample", "--out=new", "--n=2", "--steps=3")
    assert len(figures("new")) == 4 and "ldm.pt stopped" in str(sys.stdout.write.mock_calls)

@each("stage", ["ae", "ldm"])
def test_resuming_refuses_other_settings_but_not_those_that_change_nothing(train, out, stage):
    """Each setting that changes the outcome is refused by its name, the others are free."""
    path, content = out / f"{stage}.pt", torch.load(out / f"{stage}.pt")
    (ckpt,) = content.values()
    config, free = ckpt["config"], "out data data_root steps amp compile save_every"
    for name in set(config) - set(free.split()):
        ckpt["config"] = config | {name: "other" * 99}
        torch.save(content, path)
        before = path.read_bytes()
        with refused(match=f"trained on .* with different {name} ") as caught:
            train(stage, "out", steps=9)
        assert path.read_bytes() == before and len(str(caught.value)) < 300, name
    ckpt["config"] = config | dict.fromkeys(free.split(), "other")
    torch.save(content, path)
    assert train(stage, "out", steps=6, amp="fp16")["step"] == 6

def test_other_pictures_are_refused_wherever_they_would_mix(train, out, faces, monkeypatch):
    """One photo more, less or changed is another data set, but a copy is welcome."""
    for name in ("copy", "more", "less", "changed", f"moved/{faces.name}"):
        shutil.copytree(faces, name)
    shutil.copy("more/00.png", "more/new.png")
    os.remove("less/00.png")
    Image.new("RGB", (20, 20), "red").save("changed/00.png")
    os.truncate("changed/00.png", (faces / "00.png").stat().st_size)  # as long as before
    for stage in ("ae", "ldm"):
        train(stage, "out", data="copy")
    command("sample", "--out=out", f"--data=moved/{faces.name}", "--n=1", "--steps=1")
    encoded = spy(monkeypatch, ldm, "encode_images")
    drawn = spy(monkeypatch, ldm.LatentDiffusion, "sample")
    for data in ("more", "less", "changed"):
        for stage in ("ae", "ldm"):
            with refused(match="pictures"):
                train(stage, "out", data=data, steps=9)
        with refused(match="data"):
            figures(out, data=data)
        with refused(match="was trained on .*--out"):
            command("sample", "--out=out", f"--data={data}")
    with refused(match="lr"):
        train("ldm", "out", lr=1.0)
    monkeypatch.setattr(os, "access", Mock(return_value=False))
    with refused(match="copy it.*--out"):  # a teacher's run may be read-only
        command("sample", "--out=out")
    assert not encoded and not drawn  # all were refused before

def test_damaged_and_foreign_checkpoints_are_refused(train, out):
    """Half a file, another stage's or program's, no archive and code cost one sentence each."""
    path = out / "ae.pt"
    wrong = wrong_files(path.read_bytes()) | {"stage": (out / "ldm.pt").read_bytes()}
    for content in wrong.values():
        path.write_bytes(content)
        for stage in ("ae", "ldm"):
            with refused(match=re.escape(f"{path} cannot be read (") + r"\S.*\)"):
                train(stage, "out", steps=9)
        assert path.read_bytes() == content
    assert not Path("trap").exists()

def test_full_disk_costs_nothing_that_was_there(train, out):
    """What cannot be written whole is not written; the checkpoint before it is used later on."""
    resource = pytest.importorskip("resource")  # POSIX
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    draw = partial(command, "sample", "--out=out", "--n=2", "--steps=3")
    draw()
    before = {path: path.read_bytes() for path in out.rglob("*.p*")}  # .pt and .png
    trainings = [(f"{stage}.pt", size, partial(train, stage, "out", steps=6))
                 for stage in ("ae", "ldm") for size in (20_000, 100)]
    for file, size, write in (*trainings, ("progress.png", 1000, partial(draw, "--seed=1"))):
        with contextlib.ExitStack() as stack, refused(match=f"out.*{file} .*File too large"):
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            write()
    assert {path: path.read_bytes() for path in out.rglob("*.p*")} == before
    assert train("ae", "out", steps=6)["step"] == 6 and not [*out.rglob("*.tmp")]

@each("stage", ["ae", "ldm"])
@each("suffix, times", [("", 3), (".pt", 4), (".png", math.inf), (".pt", math.inf)])
def test_files_held_open_cost_no_training(train, out, monkeypatch, capsys, stage, suffix, times):
    """Emulates Windows, which refuses os.replace for a moment, or for ever: then the old stays."""
    def replace(source, target):
        if str(target).endswith(suffix) and len(calls) < times:
            calls.append(target)
            raise PermissionError(13, "another process")
        real(source, target)
    calls, real, before = [], os.replace, (out / f"{stage}.pt").read_bytes()
    (out / f"{stage}.pt.tmp").write_text("left by a killed run")
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(ldm.time, "sleep", Mock())
    lost = suffix == ".pt" and times > 4  # a save that fails is tried again by the next one
    with refused(match=f"{stage}.pt cannot be") if lost else contextlib.nullcontext():
        train(stage, "out", steps=8, save_every=6)
    assert bool(re.search("warning: out.*be written", capsys.readouterr().out)) == (times > 3)
    assert ((out / f"{stage}.pt").read_bytes() == before) == lost and not [*out.rglob("*.tmp")]
    assert (out / f"pictures/{stage}-000008.png").exists() == (times < 5)

def test_what_takes_long_is_shown_and_saved_less_often(train, monkeypatch, capsys):
    """By a false clock: a line after each five seconds, and a second's save once in twenty."""
    monkeypatch.setattr(ldm.time, "perf_counter", iter(range(9999)).__next__)  # a second a look
    assert list(ldm.progress(iter(range(30)), "reading", 30)) == [*range(30)]
    assert capsys.readouterr().out == "".join(f"reading {k} of 30\n" for k in (5, 11, 17, 23, 29))
    calls = spy(monkeypatch, torch, "save")
    train("ae", steps=30, save_every=1)
    steps = [ckpt["step"] for content, _ in calls for ckpt in content.values()]
    assert steps[0] == 1 and steps[-1] == 30 and set(np.diff(steps[:-1])) <= {5, 6, 7}
    assert len(os.listdir("new/pictures")) == 30  # a step takes four seconds
    rows = [{"step": 10 * i, "loss": 1e6 if i == 1 else math.sin(i)} for i in range(1, 101)]
    picture = np.asarray(ldm.draw_curves(rows))
    heights = np.nonzero((picture[:, 120:] == (31, 95, 191)).all(2).any(1))[0]  # of blue
    assert 60 < np.ptp(heights) < 80 and len(picture) == 120  # its panel has 70

@each("stage", ["ae", "ldm"])
def test_what_is_not_finite_is_never_saved(train, out, monkeypatch, stage):
    """After a bad loss or a gradient that spoils weights, the last good checkpoint is there."""
    def infinite(parameters, _):
        for p in parameters:
            p.grad.fill_(math.inf)
    before = (out / f"{stage}.pt").read_bytes()
    for owner, name, function in ((ldm.F, "mse_loss", lambda a, b: (a - b).sum() * math.nan),
                                  (nn.utils, "clip_grad_norm_", infinite)):
        with monkeypatch.context() as patch, refused(match="step 5 .*not finite"):
            patch.setattr(owner, name, function)
            train(stage, "out", steps=5)
    assert (out / f"{stage}.pt").read_bytes() == before

# ---- 14. Device and speed -----------------------------------------------------------------------
@pytest.fixture
def fake_cuda(monkeypatch):
    """A device, CUDA emulated for compile_networks: tensors for it are made on the CPU."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **kw: zeros(*size, **kw))
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr(nn.Module, "compile", Mock())
    return torch.device("cuda")

@each("offset, spread", [(0, 1), (30, 2), (100, 0), (30, 1e-4)])
def test_compiling_changes_neither_answers_nor_gradients_nor_names(fake_cuda, offset, spread):
    """On a GPU (emulated) norms become one-pass ones, equal also far from 0, finite if flat."""
    nets, results = [nn.Sequential(nn.GroupNorm(8, 64)) for _ in range(2)], []
    nets[1].load_state_dict(shaken(nets[0]).state_dict())
    values = offset * torch.rand(40, 1, 1, 1) + spread * torch.randn(40, 64, 6, 10)
    ldm.compile_networks(ldm.LDMConfig(), torch.device("cpu"), *nets)
    for net, on, kind in zip(nets, (False, True), (nn.GroupNorm, ldm.OnePassGroupNorm)):
        ldm.compile_networks(ldm.LDMConfig(compile=on), fake_cuda, net)
        assert type(net[0]) is kind
        x = values.clone().requires_grad_()
        y = net(x)
        (y * values.cos()).sum().backward()  # some slope or other
        assert y.isfinite().all() and x.grad.isfinite().all()
        grads = {name: p.grad for name, p in net.named_parameters()}
        results.append([y] + [grads, x.grad] * bool(spread))
    if spread != 1e-4:  # there all digits are rounding
        close(*results, rtol=1e-3, atol=1e-2)

@each("stage", ["ae", "ldm"])
def test_without_a_compiler_training_goes_on(train, fake_cuda, monkeypatch, capsys, stage):
    """Where compiling fails, on an emulated GPU, a line gives the reason and nets stay plain."""
    def compile_networks(cfg, _, *networks):
        nets.extend(networks)
        real(cfg, fake_cuda, *networks)
    nets, real = [], ldm.compile_networks
    failing = Mock(side_effect=RuntimeError("Cannot find a working triton installation\nand many"))
    monkeypatch.setattr(torch, "compile", Mock(return_value=failing))
    monkeypatch.setattr(ldm, "compile_networks", compile_networks)
    assert train(stage)["step"] == 4
    said = capsys.readouterr().out
    assert re.search("not compiled.*working triton installation\n", said) and "many" not in said
    assert nets and not any(isinstance(m, ldm.OnePassGroupNorm) for n in nets for m in n.modules())

# ---- 15. Command line ---------------------------------------------------------------------------
@each("line, word", [
    ("sample", "python ldm.py demo"), ("eval", "python ldm.py demo"),
    ("sample --data nope", "nope"), ("train-ae --data nope", "nope"), ("eval --out nope", "nope"),
    ("train-ldm --out nope", "nope/ae.pt.*train-ae"), ("demo --seed -3", "--seed -3"),
    ("train-ae --data celebhq", "--data celebhq.*data/celebhq.*README"),
    ("train-ae --data celebhq --size 100", "--size 100.*divisible by 8"),
    ("train-ae --perceptual-weight 1", "vgg16.* --perceptual-weight 0")])
def test_mistakes_cost_one_sentence_and_create_nothing(monkeypatch, line, word):
    """Exit code 2 and a line that says what to do come without traceback or files."""
    monkeypatch.setattr(models.VGG16_Weights, "get_state_dict", None)
    monkeypatch.setattr(ldm, "toyfaces", lambda *_: torch.zeros(2000, 3, 32, 32).byte())  # quick
    with refused(match=word):
        command(*line.split())
    assert not os.listdir()

@each("command", ldm.COMMANDS)
def test_help_lists_every_flag_with_its_default(command, capsys, monkeypatch):
    """Beside each flag, below its heading, stand its meaning, its default and the presets."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        ldm.main([command, "--help"])
    text, cls = " ".join(capsys.readouterr().out.split()), ldm.COMMANDS[command][0]
    for f in [f for f in fields(cls) if f.metadata]:
        default = f" (default: {f.default}" if f.default is not None else ""
        for part in (f"--{f.name}".replace("_", "-"), f"{f.metadata['text']}{default}"):
            assert part in text, part
    if cls is ldm.AEConfig:
        assert "(default: (64, 64, 128, 256); toyfaces (16, 32, 32); mnist (32, 64, 64))" in text
        assert re.search("data and run: --.*optimisation: --.*model: --.*losses: --", text)

@each("error, word", [
    *[(RuntimeError(f"so long: {words}"), "error: .*--batch")
      for words in ("out of memory", "not enough memory", "can't allocate memory")],
    (MemoryError(), "error: .*--batch"), (OSError(28, "No space left"), "error: .*No space left"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "^mat1 and mat2")])
def test_exhausted_memory_and_disks_are_one_sentence(monkeypatch, error, word):
    """PyTorch's long message becomes advice; other errors of PyTorch stay visible."""
    monkeypatch.setitem(ldm.COMMANDS, "sample", (ldm.SampleConfig, Mock(side_effect=error), ""))
    with pytest.raises((ldm.UserError, RuntimeError), match=word):
        command("sample")

def test_demo_runs_both_stages_and_samples(monkeypatch, capsys):
    """All get the settings that were typed; who types no command is told of this one first."""
    ran = []
    for name in ("train_ae", "train_ldm", "sample"):
        monkeypatch.setattr(ldm, name, ran.append)
    assert ldm.main(["demo", "--seed", "3"]) == 0
    assert list(map(type, ran)) == [ldm.AEConfig, ldm.LDMConfig, ldm.SampleConfig]
    assert {(cfg.seed, cfg.out) for cfg in ran} == {(3, "runs/toyfaces")} and ran[2].n == 64
    assert ldm.main([]) == 0
    assert re.findall("^    ([a-z-]+) ", capsys.readouterr().out, re.M) == [*ldm.COMMANDS]

# ---- README -------------------------------------------------------------------------------------
def test_readme_commands_and_notebook_run_and_its_pictures_are_small(monkeypatch):
    """Commands can be typed as they stand there, and the cell runs; assets is less than 1 MB."""
    noise = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8)  # quicker than faces
    monkeypatch.setattr(ldm, "toyfaces", Mock(return_value=noise))
    for kind, block in re.findall(r"```(\w*)\n(.*?)```", README, re.S):
        if kind == "python":
            exec(block, {})
        else:
            for line in re.findall(r"python ldm\.py ([a-z][^#;&|>)\n]+)", block):
                given = vars(ldm.build_parser().parse_args(line.split()))
                ldm.resolve(ldm.COMMANDS[given.pop("command")][0], given)
    assert {path.name for path in Path().rglob("*.pt")} == {"ae.pt", "ldm.pt"}
    pictures = set(re.findall(r"assets/[\w.-]+", README))
    assert {f"assets/{p.name}" for p in (HERE / "assets").iterdir()} == pictures != set()
    assert sum((HERE / p).stat().st_size for p in pictures) < 1_000_000

HOMEWORK = {"quantise": "quantiser", "add_noise": "inverts", "z0_and_eps": "inverts samplers",
            "ddim_step": "samplers", "generator_loss": "gan_losses", "sinusoids": "sinusoids",
            "discriminator_loss": "gan_losses", "learning_rate": "learning_rate_rises"}

def blank(file, names):
    """For teachers: in a copy of ldm.py, replaces the bodies of these functions. This goes once
    only, because a second time would erase what a student has written."""
    text = file.read_text(encoding="utf-8")
    assert "# homework" not in text, "ldm.py is homework already; blank a fresh copy of it"
    assert {*names} <= {*HOMEWORK}, f"homework is for {', '.join(HOMEWORK)}; nothing was changed"
    lines = text.splitlines()
    for f in sorted(ast.walk(ast.parse(text)), key=lambda n: -getattr(n, "lineno", 0)):
        if isinstance(f, ast.FunctionDef) and f.name in names:
            body = f.body[1:]  # behind the docstring
            body = body[0].body if isinstance(body[0], ast.With) else body  # float32 in quantise
            todo = " " * body[0].col_offset + "raise NotImplementedError"
            lines[body[0].lineno - 1:body[-1].end_lineno] = [todo]
    file.write_text("\n".join(lines) + "\n# homework\n", encoding="utf-8")

@each("name", HOMEWORK, ids="abcdefgh")
def test_homework_fails_its_own_tests_and_no_others(monkeypatch, name):
    """With one body blanked, the tests that the README names for it fail, and others pass."""
    class Plugin:
        def pytest_runtest_logreport(self, report):
            failed.update(word for word in graded if report.failed and word in report.nodeid)
    graded, failed = re.findall("`(.+?)`", re.search("-k NAME`(.*?)\n\n", README, re.S)[1]), set()
    Path("ldm.py").write_text(TEXT)
    pytest.raises(AssertionError, blank, Path("ldm.py"), [name, "typo"])  # and changes nothing
    blank(Path("ldm.py"), [name])
    with pytest.raises(AssertionError, match="homework already"):
        blank(Path("ldm.py"), [name])
    blanked = SimpleNamespace(__file__=ldm.__file__, __name__="blanked")
    exec(Path("ldm.py").read_text(), vars(blanked))
    path = [k for k in ("VectorQuantizer", "NoiseScheduler") if hasattr(getattr(ldm, k), name)]
    ours, theirs = (getattr(m, *path) if path else m for m in (ldm, blanked))
    monkeypatch.setattr(ours, name, getattr(theirs, name))
    words = f"({' or '.join(graded)}) and not homework and not reproduce"
    pytest.main([__file__, "-qq", "--tb=no", "-pno:cacheprovider", "-k", words], [Plugin()])
    assert failed == set(HOMEWORK[name].split()), "not blanked, or not graded by these tests alone"

if __name__ == "__main__":
    assert sys.argv[1:2] == ["homework"], "the tests are run by: pytest"
    blank(HERE / "ldm.py", sys.argv[2:] or HOMEWORK)
