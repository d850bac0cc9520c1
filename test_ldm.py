"""Tests of ldm.py, in the order of its sections: each block, loss and sampler against a formula or
a brute-force reference, the data loader against a zoo of pictures, then training, resuming and the
command line with tiny networks. CPU only, no network, nothing outside the repository."""
import ast
import contextlib
import importlib.util
import io
import math
import os
import re
import shutil
import signal
import sys
import threading
import weakref
from dataclasses import fields, replace
from pathlib import Path

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
TEXT = (HERE / "ldm.py").read_text()
README = (HERE / "README.md").read_text()
CPU = torch.device("cpu")
SIGNALS = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
TINY = {
    "ae": dict(size=16, widths=(8, 16), layers=1, z_channels=2, codebook_size=16, batch=4, steps=4,
               lr=2e-3, perceptual_weight=0.0, gan_weight=0.0),
    "ldm": dict(widths=(16, 24), layers=1, batch=8, steps=4, lr=2e-3)}
close = torch.testing.assert_close
each = pytest.mark.parametrize

# ---- Helpers ------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def clean_start(tmp_path, monkeypatch, request):
    """An empty folder, fixed random numbers, made-up VGG16 weights and no GPU for each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.VGG16_Weights, "get_state_dict",
                        lambda *_, **__: request.getfixturevalue("vgg"), raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", always(False))
    torch.manual_seed(0)
    handlers = {s: signal.signal(s, signal.default_int_handler) for s in SIGNALS}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)

@pytest.fixture(scope="module")
def vgg():
    """VGG16 `features.*` weights from a formula, of the usual size; no random generator."""
    with torch.device("meta"):
        shapes = models.vgg16().features.state_dict()
    state = {}
    for name, w in shapes.items():
        wave = torch.arange(w.numel(), dtype=torch.float64).square().mul(0.1).sin().view(w.shape)
        fan_in = w[0].numel() if w.dim() > 1 else 400
        state[f"features.{name}"] = (wave * (4 / fan_in) ** 0.5).float()
    return state

@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A folder of 40 PNGs (20x20): 36 to train on, 4 held out."""
    folder = tmp_path_factory.mktemp("faces")
    for i in range(40):
        Image.fromarray(face(i, 20)).save(folder / f"{i:02}.png")
    return folder

@pytest.fixture(scope="module")
def train(faces, tmp_path_factory):
    """train(stage, out, **settings): a tiny training on the faces, returns its checkpoint. For
    stage 2 a new folder gets an autoencoder. train.root: a folder with finished ones."""
    def run(stage, out="new", log_every=2, **settings):
        ldm.Run.due.__defaults__ = (log_every,)  # in ldm.py: 100
        sample = ldm.LatentDiffusion.sample.__wrapped__  # pictures in training: 4 steps, not 30
        sample.__defaults__ = ("dpm", 4, *sample.__defaults__[2:])
        if stage == "ldm" and not Path(out).exists():
            shutil.copytree(root / "ae", out)
        given = TINY[stage] | dict(data=faces, data_root=root, out=out) | settings
        command(f"train-{stage}", *words(given))
        return load(Path(out, f"{stage}.pt"))
    run.root = root = tmp_path_factory.mktemp("runs")
    run("ae", root / "ae")
    run("ldm", root / "both")
    return run

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

def always(answer):
    """A function that answers the same to everything."""
    return lambda *args, **kwargs: answer

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

def draw(out, **settings):
    """`sample` with few pictures and steps."""
    command("sample", *words(dict(out=out, n=2, steps=3) | settings))

def refused(word):
    """The block below must raise a UserError that holds this word."""
    return pytest.raises(ldm.UserError, match=word)

def load(path):
    """What a checkpoint holds below its kind."""
    (content,) = torch.load(path, weights_only=True).values()
    return content

def load_folder(folder="in", size=16, channels=3):
    images, _ = ldm.load_folder(Path(folder), size, channels, Path("cache"))
    return images

def face(i, size):
    """Toy face number i as an array (size, size, 3)."""
    return ldm.toyfaces([i], size)[0].permute(1, 2, 0).numpy()

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
    return np.asarray(Image.open(path)).astype(int)

# ---- The file -----------------------------------------------------------------------------------
def test_file_is_tidy_and_imports_only_what_the_readme_installs():
    """100 columns, numbered banners; the standard library, torch, torchvision, PIL and numpy."""
    assert max(map(len, TEXT.splitlines())) <= 100
    numbers = re.findall(r"^# ---- (\d+)\. [A-Z].* -+$", TEXT, re.M)
    assert numbers == [str(i + 1) for i in range(TEXT.count("\n# ----"))]
    nodes = list(ast.walk(ast.parse(TEXT)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert names == {"torch", "torchvision", "PIL", "numpy"}

def test_importing_is_silent_and_finds_the_weights_behind_a_link(capfd, monkeypatch):
    """Nothing is printed or created; through a symbolic link lpips_weights.pth is found, too."""
    Path("link.py").symlink_to(HERE / "ldm.py")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("link", "link.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.LPIPS_WEIGHTS.exists()
    assert capfd.readouterr() == ("", "") and os.listdir() == ["link.py"]

# ---- 1. Settings --------------------------------------------------------------------------------
def flags(cls):
    """The fields of a dataclass that are on the command line."""
    return [f for f in fields(cls) if f.metadata]

def wrong_values(f):
    """Values that setting f must refuse."""
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if f.type is tuple:
        return [(), (8,), (6, 12), (8, -4), (0, 0), "88"]
    if choices or f.type is bool:
        return ["L1", "DDIM", "x0", "CPU", "no", "", 2, 1.5]
    if f.type is str:
        return [""]
    whole = [1.5, True] if f.type is int else []
    return [low - 1, low / 2 - 1e-9, 10 * high, "7", None, math.nan, math.inf, *whole]

def test_settings_are_default_then_preset_then_given():
    """What the user gives wins over the data set's preset, which wins over the default."""
    cfg = ldm.resolve(ldm.AEConfig, dict(data="mnist", widths=[8, 8]))
    assert (cfg.widths, cfg.size, cfg.gan) == ((8, 8), 28, "hinge")
    mnist, toy = (ldm.resolve(ldm.AEConfig, dict(data=d)) for d in ("mnist", "toyfaces"))
    assert mnist.perceptual_weight == toy.perceptual_weight == 0  # without a download
    assert not mnist.flip and not ldm.resolve(ldm.LDMConfig, dict(data="mnist")).flip
    assert ldm.resolve(ldm.AEConfig, dict(data="/a/photos/x/..")).out == str(Path("runs", "photos"))
    for amp, dtype in (("auto", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert ldm.pick_device(ldm.RunConfig(amp=amp)) == (CPU, dtype)  # auto: there is no GPU

@each("cls", [ldm.AEConfig, ldm.LDMConfig, ldm.SampleConfig, ldm.RunConfig])
def test_every_setting_takes_right_values_and_refuses_wrong_ones(cls):
    """Another type, not among the choices, out of range, not finite: the flag is named."""
    wrong = [{f.name: value} for f in flags(cls) for value in wrong_values(f)]
    if cls is ldm.AEConfig:  # --widths halves the image, which may not be tiny
        wrong += [dict(out=__file__), dict(out="a/", data="a"), dict(size=8, widths=(8, 8))]
    for given in wrong:
        with refused(f"--{next(iter(given)).replace('_', '-')} "):
            print("taken:", given, ldm.resolve(cls, given))
    for f in flags(cls):
        for value in f.metadata["choices"] or []:
            assert getattr(ldm.resolve(cls, {f.name: value}), f.name) == value

# ---- 2. Data ------------------------------------------------------------------------------------
def test_toyfaces_are_deterministic_and_all_different():
    """Face i is the same alone, in another size; backgrounds have the colours of their table."""
    x = ldm.toyfaces(range(100), 16)
    assert x.dtype == torch.uint8 and x.shape == (100, 3, 16, 16) and len(keys(x)) == 100
    assert torch.equal(x[7:9], ldm.toyfaces([7, 8], 16))
    assert (F.avg_pool2d(ldm.toyfaces([5], 32).float(), 2)[0] - x[5]).abs().mean() < 3
    assert {tuple(corner.tolist()) for corner in x[:, :, 0, 0]} == set(ldm.BACK)

def test_to_float_spans_minus_one_to_one_and_pictures_take_it_back():
    """0 becomes -1, 255 becomes 1; each of the 256 values comes back, rounded and not cut."""
    x = ldm.to_float(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), CPU)
    assert x.min() == -1 and x.max() == 1
    for change in (0, -0.3 / 127.5, 0.3 / 127.5):
        picture = np.asarray(ldm.image_grid(x + change, 1))[2:-2, 2:-2, 0]  # without the frame
        assert np.array_equal(picture[::6, ::6].flatten(), np.arange(256)), change

def rgba(size=16):
    """A picture (size, size, 4) whose colours and transparency vary."""
    y, x = np.mgrid[:size, :size] * 255 // (size - 1)
    return np.stack([x, y, 255 - x, (x + y) // 2], axis=2).astype(np.uint8)

def zoo():
    """(name, picture, save options, what the RGB pixels should be), all 16x16."""
    a, grey = rgba(), rgba()[..., 0]
    rgb, three, opaque = a[..., :3], np.repeat(grey[..., None], 3, 2), a[..., 3:] / 255
    cmyk = Image.merge("CMYK", Image.fromarray(a).split())
    palette = Image.fromarray(grey // 64).convert("P")
    palette.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    table = np.array([[255] * 3, [200, 0, 0], [0, 200, 0], [0, 0, 200]])  # index 0: see-through
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(a[..., 3])])
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)[::-1] // 100 * 100
    return [("one_bit.png", Image.fromarray(grey > 99), {}, (three > 99) * 255),
            ("sixteen_bits.png", Image.fromarray(deep), {}, deep[..., None] / 257 * np.ones(3)),
            ("grey_alpha.png", la, {}, three * opaque + 255 * (1 - opaque)),
            ("palette.png", palette, {"transparency": 0}, table[grey // 64]),
            ("rgba.png", Image.fromarray(a), {}, rgb * opaque + 255 * (1 - opaque)),
            ("cmyk.tif", cmyk, {}, np.asarray(cmyk.convert("RGB")))]

@each("name, image, options, expected", zoo(), ids=[z[0] for z in zoo()])
def test_every_kind_of_picture_is_decoded(name, image, options, expected):
    """Palettes, transparency over white, 1, 8 and 16 bits, CMYK: right pixels, also in grey."""
    image.save(name, **options)
    got, grey = ldm.decode_image(name, 16, 3), ldm.decode_image(name, 16, 1)
    assert got.dtype == np.uint8 and got.shape == (16, 16, 3) and grey.shape == (16, 16, 1)
    assert np.abs(got - expected.astype(float)).max() < 0.6  # rounded; alpha nearly so
    assert np.abs(grey[..., 0] - expected @ [0.299, 0.587, 0.114]).max() < 1.2

@each("orientation, turn", [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_photos_held_sideways_come_out_upright(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(face(0, 16)).save("a.jpg", exif=exif)
    assert np.array_equal(ldm.decode_image("a.jpg", 16, 3), np.rot90(pixels("a.jpg"), turn))

@each("w, h", [(1, 1), (5, 301), (301, 5), (48, 32), (1, 4999)])
def test_odd_sizes_give_the_centre_square(w, h):
    picture = np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.uint8)
    Image.fromarray(picture).save("a.png")
    side = min(w, h)
    top, left = (h - side) // 2, (w - side) // 2
    square = picture[top:top + side, left:left + side]
    assert np.array_equal(ldm.decode_image("a.png", side, 3), square)

def test_shrinking_while_decoding_changes_a_jpeg_little():
    """The fast way to a small picture is close to decoding the whole and shrinking that."""
    noisy = face(1, 300) + np.random.default_rng(0).normal(0, 40, (300, 300, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save("a.jpg")
    whole = ImageOps.fit(Image.open("a.jpg"), (32, 32), Image.Resampling.LANCZOS)
    assert np.abs(ldm.decode_image("a.jpg", 32, 3) - np.asarray(whole, float)).mean() < 1.5

def test_good_files_of_a_folder_are_read_and_bad_ones_named(capsys):
    """Odd names, subfolders; torn, fake, float pictures, links to nothing are skipped."""
    Path("in/deep").mkdir(parents=True)
    good = ("deep/with space.png", "ünïcode 顔.png", "new\nline.png", "UPPER.PNG", "a.bmp")
    for i, name in enumerate(good):
        Image.fromarray(face(i, 16)).save(f"in/{name}")
    picture = Image.fromarray(face(9, 16))
    picture.save("in/cut.jpg")
    Path("in/cut.jpg").write_bytes(Path("in/cut.jpg").read_bytes()[:300])
    picture.convert("F").save("in/float.tif")
    picture.convert("I").save("in/int.tif")
    Path("in/text.jpg").write_text("I am no picture")
    Path("in/notes.txt").write_text("no picture")
    Path("in/gone.png").symlink_to("nowhere.png")
    assert keys(load_folder()) == keys(ldm.toyfaces(range(5), 16))
    lines = capsys.readouterr().out
    assert all(bad in lines for bad in ("5 pictures, 4 more", "cut.jpg", "text.jpg", "t.tif"))

@each("names", ["", "a.txt", "a.png b.jpg c.bmp", "00.png 01.png", "00.png 01.png c.bmp"])
def test_folder_with_fewer_than_three_pictures_is_refused(faces, names):
    """Empty, without pictures, all broken, or two: a mistake of the user; no cache is left."""
    Path("in").mkdir()
    for name in names.split():
        good = faces / name
        Path("in", name).write_bytes(good.read_bytes() if good.exists() else b"no picture")
    with refused("--data .*in"):
        load_folder()
    assert not list(Path().glob("cache/*"))

@each("link", [False, True])
def test_folder_is_decoded_once_until_something_changes(faces, monkeypatch, link):
    """Another size, other channels, a file of the same name and length, also behind a link."""
    def decoded(*shape):
        calls.clear()
        assert len(load_folder("in", *shape)) == 41
        return len(calls)
    shutil.copytree(faces, "in")
    target, calls = Path("far.bmp" if link else "in/z.bmp"), spy(monkeypatch, ldm, "decode_image")
    Image.new("RGB", (20, 20), "red").save(target)
    if link:
        Path("in/z.bmp").symlink_to(target.absolute())
    assert [decoded(), decoded(), decoded(8), decoded(16, 1), decoded()] == [41, 0, 41, 41, 0]
    Image.new("RGB", (20, 20), "blue").save(target)
    os.utime(target, (1e9, 1e9))
    assert [decoded(), decoded()] == [41, 0]
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert keys(blue) < keys(load_folder())

def test_held_out_images_are_a_fixed_and_mixed_tenth(faces, monkeypatch):
    """Two to a thousand; not the last files of the folder, and the same wherever the cache is."""
    order, name = ldm.load_folder(faces, 16, 3, Path("a"))
    again, name_again = ldm.load_folder(faces, 16, 3, Path("b"))
    assert torch.equal(order, again) and name == name_again
    last = np.stack([ldm.decode_image(path, 16, 3) for path in sorted(faces.iterdir())[-4:]])
    assert keys(order[-4:]) != keys(torch.from_numpy(last).permute(0, 3, 1, 2))
    for n, held in ((40, 4), (3, 2), (25, 2), (30000, 1000)):
        images = order if n == 40 else order[:1].expand(n, 3, 16, 16)
        monkeypatch.setattr(ldm, "load_folder", always((images, "")))
        parts = ldm.load_images(ldm.AEConfig(data=str(faces), size=16))
        assert len(parts[1]) == held and torch.equal(torch.cat(parts), images)

def test_linked_folders_are_no_trap(faces):
    """A linked folder counts; a link to a parent brings no picture twice."""
    Path("in").mkdir()
    Path("in/faces").symlink_to(faces)
    Path("in/up").symlink_to(Path("in").absolute())
    assert len(load_folder()) == 40

@each("stage", ["ae", "ldm"])
def test_pictures_of_a_run_are_no_data(faces, train, stage):
    """If the run folder lies in the data folder, what it holds is never read as a photo."""
    shutil.copytree(faces, "in")
    for each_stage in ("ae", "ldm", "ae"):  # the last one resumes
        train(each_stage, "in/deep/run", data="in")
    draw("in/deep/run")
    Path(f"in/deep/run/{stage}.pt").unlink()  # the other one is enough to tell a run
    assert len(list(Path("in").rglob("*.png"))) > 44 and len(load_folder()) == 40

def test_built_in_data_sets_are_found_or_name_their_place(faces, monkeypatch):
    """celebhq is a folder of that name in --data-root; MNIST has one channel, of any size."""
    class Digits:
        def __init__(self, root, train=True, download=False):
            assert train and download  # the test set stays unseen
            self.data = torch.full((70, 28, 28), 99, dtype=torch.uint8)
    cfg = ldm.AEConfig(data="celebhq", data_root=".", size=32)
    with refused(os.path.join(os.getcwd(), "celebhq")):
        ldm.load_images(cfg)
    Path("celebhq").symlink_to(faces)
    assert [len(x) for x in ldm.load_images(cfg)] == [36, 4] and cfg.data_root == os.getcwd()
    cfg = replace(cfg, data="mnist", channels=1, data_name="")
    monkeypatch.setattr(ldm.datasets, "MNIST", None)  # as if there were no internet
    with refused(os.path.join(os.getcwd(), "MNIST", "raw")):
        ldm.load_images(cfg)
    monkeypatch.setattr(ldm.datasets, "MNIST", Digits)
    assert [x.shape for x in ldm.load_images(cfg)] == [(63, 1, 32, 32), (7, 1, 32, 32)]
    with refused("--channels 3"):
        ldm.load_images(replace(cfg, channels=3))

# ---- 3. Blocks ----------------------------------------------------------------------------------
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
    assert not torch.allclose(y, up(x, t_emb, -skip))
    assert (ldm.ResBlock(8, 8, heads=4)(x) - x).std((2, 3)).max() < 1e-6  # starts as the shortcut
    assert not resample or torch.equal(up.up[0](x)[..., 1::2, ::2], x)  # nearest

def test_no_channel_is_normalised_alone():
    """A group of one channel would take its mean away; there are at most 32 groups."""
    for c in (4, 8, 12, 16, 24, 48, 64, 128, 192, 512):
        groups = ldm.group_norm(c).num_groups
        assert [type(m) for m in ldm.norm_silu_conv(c, 4)] == [nn.GroupNorm, nn.SiLU, nn.Conv2d]
        assert c % groups == 0 and c // groups >= 4 and groups <= 32

def test_attention_equals_softmax_written_out():
    layer, x = shaken(ldm.Attention(8, heads=2)), torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=2)   # (B, 15, 8)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / 4 ** 0.5
        heads.append(scores.softmax(2) @ v[..., head])
    close(layer(x), x + layer.proj(torch.cat(heads, 2)).transpose(1, 2).view_as(x))

def test_sinusoids_tell_all_steps_apart():
    codes = ldm.sinusoids(torch.arange(1000), 32)
    close(codes.square().sum(1), torch.full((1000,), 16.0))  # sin^2 + cos^2
    assert (torch.cdist(codes, codes) + 9 * torch.eye(1000)).min() > 0.1

# ---- 4. Autoencoders ----------------------------------------------------------------------------
@pytest.fixture
def vq():
    return shaken(ldm.VQVAE(1, (8, 8), layers=1, z_channels=4, codebook_size=64))

@pytest.fixture
def vae():
    """x_rec is z, and the encoder's answer is set by the test."""
    vae = ldm.VAE(1, (8, 8), 1, 2)
    vae.decoder = nn.Identity()
    return vae

@each("bf16", [False, True])
def test_quantiser_finds_the_nearest_code(vq, bf16):
    """As a brute-force search in float64, also under bf16 autocast, which would get many wrong."""
    z_e, codes = torch.randn(4, 4, 12, 12), vq.codebook.weight
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        z_q, indices = vq.quantise(z_e)
    vectors = z_e.double().movedim(1, -1).reshape(-1, 1, 4)
    nearest = (vectors - codes.double()).square().sum(-1).argmin(1)
    assert torch.equal(indices.flatten(), nearest)
    assert torch.equal(z_q.movedim(1, -1).reshape(-1, 4), codes[nearest])

def test_gradient_goes_straight_through_the_quantiser(vq):
    """z_e gets the gradient that the decoder sends to z_q; forward and decode both quantise."""
    z_e = torch.randn(2, 4, 3, 3, requires_grad=True)
    vq.encode = always(z_e)
    x_rec, _ = vq(torch.zeros(2, 1, 6, 6))
    z_q = vq.quantise(z_e)[0].detach().requires_grad_()
    expected = vq.decoder(z_q)
    close([x_rec, vq.decode(z_e)], [expected, expected], rtol=1e-4, atol=1e-5)
    x_rec.square().sum().backward()
    expected.square().sum().backward()
    close(z_e.grad, z_q.grad, rtol=1e-3, atol=1e-5)
    assert z_e.grad.abs().max() > 0 and not torch.allclose(z_q, z_e)

@each("term, moved, still", [("codebook", "codebook", "encoder"),
                             ("commit", "encoder", "codebook")])
def test_codebook_loss_moves_codes_and_commitment_loss_the_encoder(vq, term, moved, still):
    """Each stop-gradient is on the right side, Eq. 3; the value is the mean squared distance."""
    x = torch.randn(2, 1, 8, 8)
    loss, z_e = vq(x)[1][term], vq.encode(x)
    close(loss, (z_e - vq.quantise(z_e)[0]).square().mean())
    loss.backward()
    for name, p in vq.named_parameters():
        assert p.grad is None or not name.startswith((still, "decoder"))
        assert p.grad is not None or not name.startswith(moved)

def test_restart_moves_dead_codes_onto_the_data(vq):
    """The first call moves all, however far the data are; later ones only what was not picked."""
    far = 50 + 3 * torch.randn(2, 4, 16, 16)
    vq.restart_codes(far)
    codes = vq.codebook.weight.detach().clone()
    nearest = torch.cdist(codes, far.movedim(1, -1).reshape(-1, 4)).min(1)
    assert nearest.values.max() < 0.5 and nearest.indices.max() >= 256  # of both images
    assert len(codes.unique(dim=0)) == 64 and len(vq.quantise(far)[1].unique()) > 55
    vq.encode = always(far[:1, :, :4, :4])
    vq(torch.zeros(1, 1, 8, 8))
    used = vq.usage > 0
    assert 0 < used.sum() < 64 and vq.usage.sum() == 4 * 4
    vq.restart_codes(torch.randn(2, 4, 4, 4))
    assert torch.equal((vq.codebook.weight != codes).any(1), ~used) and vq.usage.sum() == 0
    assert list(map(float, ldm.codebook_use(torch.tensor([3, 3, 0, 0])))) == [50, pytest.approx(2)]
    assert list(map(float, ldm.codebook_use(vq.usage))) == [0, 1]

def test_kl_equals_that_of_torch_distributions(vae):
    """The KL divergence to N(0, 1), summed and divided by the number of image values."""
    mean, logvar, x = torch.randn(3, 2, 4, 4), 3 * torch.randn(3, 2, 4, 4), torch.zeros(3, 1, 8, 8)
    vae.encoder.forward = always(torch.cat([mean, logvar], 1))
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum() / x.numel()
    close(vae(x)[1]["kl"], kl)
    assert torch.equal(vae.encode(x), mean)
    for extreme in (-1e4, 1e4):  # exp(logvar) must stay in range
        vae.encoder.forward = always(torch.full((3, 4, 4, 4), extreme))
        assert vae(x)[0].isfinite().all() and vae(x)[1]["kl"].isfinite()

def test_vae_sample_is_reparameterised(vae):
    """z has the encoder's mean and deviation, both get a gradient; a new VAE adds little noise."""
    _, logvar = vae.encoder(torch.randn(4, 1, 32, 32)).chunk(2, dim=1)
    assert (0.5 * logvar).exp().max() < 0.2  # else it would learn to shout first
    mean = torch.full((4, 2, 32, 32), 0.5, requires_grad=True)
    logvar = torch.full((4, 2, 32, 32), math.log(0.04), requires_grad=True)
    vae.encoder.forward = always(torch.cat([mean, logvar], 1))
    z = vae(torch.zeros(4, 1, 64, 64))[0]
    assert abs(z.mean() - 0.5) < 0.01 and abs(z.std() - 0.2) < 0.01
    z.sum().backward()
    close([mean.grad, logvar.grad], [torch.ones_like(z), (z - mean) / 2])  # dz / dlogvar

# ---- 5. LPIPS -----------------------------------------------------------------------------------
def waves(n, size, channels=3):
    """Two batches of images from formulas."""
    k = torch.arange(n * channels * size ** 2, dtype=torch.float64).view(n, channels, size, size)
    return (0.3 * k).sin().float(), (0.05 * k + 1).cos().float()

@each("size, full, half", [  # `lpips` 0.1.4, net="vgg", these made-up weights
    (16, (0.1871566, 0.1784239), (0.0124521, 0.0127265)),
    (28, (0.1876252, 0.1908308), (0.0185277, 0.0183998)),
    (64, (0.2209063, 0.2215153), (0.0077685, 0.0077767))])
def test_lpips_equals_the_lpips_package(vgg, size, full, half):
    """Distances recorded from the package, of two waves and of a wave to its paler copy."""
    lpips, (x, y) = ldm.LPIPS(ldm.LPIPS_WEIGHTS, vgg), waves(2, size)
    assert lpips(x, y).tolist() == pytest.approx(full, abs=1e-4)
    assert lpips(0.5 * x, x).tolist() == pytest.approx(half, abs=1e-5)

@each("dead", [False, True])
def test_lpips_of_flat_images_is_zero_with_finite_gradient(vgg, dead):
    """A square root at zero would give NaN; also if biases silence every feature."""
    weights = {k: v - 1e3 * (dead and v.dim() == 1) for k, v in vgg.items()}
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance = ldm.LPIPS(ldm.LPIPS_WEIGHTS, weights)(x, x.detach() + dead)
    distance.sum().backward()
    assert distance.item() == 0 and x.grad.isfinite().all()

def test_lpips_trains_x_alone_and_takes_grey(vgg):
    """No gradient for y and the frozen network; grey is three equal channels; float32."""
    lpips, (x, y) = ldm.LPIPS(ldm.LPIPS_WEIGHTS, vgg), waves(3, 16, channels=1)
    distance = lpips(x.requires_grad_(), y.requires_grad_())
    close(distance, lpips(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
    distance.sum().backward()
    assert distance.shape == (3,) and x.grad.abs().max() > 0 and y.grad is None
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training
    with torch.autocast("cpu", torch.bfloat16):  # squares of half precision overflow
        assert all(f.dtype == torch.float32 for f in lpips.features(x))

def test_missing_or_wrong_lpips_weights_are_explained(vgg, monkeypatch):
    """No file, an HTML page, or another program's weights; and no VGG16."""
    torch.save({"a": torch.ones(1)}, "other.pth")
    Path("page.pth").write_bytes(b"<html>not found</html>")
    for name in ("missing.pth", "other.pth", "page.pth"):
        with refused(name):
            ldm.LPIPS(name, vgg)
    monkeypatch.setattr(models.VGG16_Weights, "get_state_dict", None)  # as if offline
    with refused("vgg16"):
        ldm.LPIPS(ldm.LPIPS_WEIGHTS)

# ---- 6. PatchGAN --------------------------------------------------------------------------------
def minus_log_sigmoid(score):
    return math.log(1 + math.exp(-score))

@each("kind, g, d", [
    ("bce", (minus_log_sigmoid(0.25) + minus_log_sigmoid(3)) / 2,
     sum(map(minus_log_sigmoid, (0.5, -2, -0.25, -3))) / 4),
    ("lsgan", (0.75 ** 2 + 2 ** 2) / 2, (0.5 ** 2 + 3 ** 2 + 0.25 ** 2 + 3 ** 2) / 4),
    ("hinge", -(0.25 + 3) / 2, (0.5 + 3 + 1.25 + 4) / 4)])
def test_gan_losses_equal_their_formulas(kind, g, d):
    real, fake = torch.tensor([0.5, -2.0]), torch.tensor([0.25, 3.0])
    assert float(ldm.generator_loss(kind, fake)) == pytest.approx(g, rel=1e-5)
    assert float(ldm.discriminator_loss(kind, real, fake)) == pytest.approx(d, rel=1e-5)
    kinds = [type(m).__name__ for m in ldm.PatchGAN().net]
    assert kinds == ["Conv2d", "LeakyReLU", *2 * ["Conv2d", "BatchNorm2d", "LeakyReLU"], "Conv2d"]

# ---- 7. Noise scheduler -------------------------------------------------------------------------
def alpha_sigma(t):
    """sqrt(abar_t) and sqrt(1 - abar_t) from the definition of abar; t = -1 is clean."""
    beta = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=torch.float64) ** 2
    abar = float((1 - beta[:t + 1]).prod())
    return abar ** 0.5, (1 - abar) ** 0.5

@each("target", ["eps", "v"])
def test_prediction_target_inverts_to_z0_and_eps(target):
    """z0_and_eps takes back what add_noise did, at each step of a mixed batch, without a clamp."""
    s, (z0, eps) = ldm.NoiseScheduler(target=target), torch.randn(2, 5, 4, 8, 8)
    z0, steps = 3 * z0, [0, 1, 500, 998, 999]
    z_t, answer = s.add_noise(z0, eps, torch.tensor(steps))
    for i, t in enumerate(steps):
        alpha, sigma = alpha_sigma(t)
        v = alpha * eps[i] - sigma * z0[i]
        close(z_t[i], alpha * z0[i] + sigma * eps[i], atol=1e-4, rtol=0)
        close(answer[i], eps[i] if target == "eps" else v, atol=1e-4, rtol=0)
        close(s.z0_and_eps(answer[i], z_t[i], t), (z0[i], eps[i]), atol=1e-3, rtol=0)

@each("steps", [1, 2, 7, 20, 1000])
def test_timesteps_run_from_the_noisiest_to_clean(steps):
    starts, ends = zip(*ldm.NoiseScheduler().timesteps(steps))
    assert len(starts) == steps and starts[0] == 999 and ends[-1] == -1 and starts[1:] == ends[:-1]
    gaps = [t - t_next for t, t_next in zip(starts, ends)]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1

def oracle(target, mean, std):
    """The best UNet if each latent value is N(mean, std^2), independent of the others."""
    def answer(z_t, t):
        alpha, sigma = alpha_sigma(int(t[0]))
        away = (z_t - alpha * mean) / (alpha ** 2 * std ** 2 + sigma ** 2)
        z0, eps = mean + alpha * std ** 2 * away, sigma * away
        return eps if target == "eps" else alpha * eps - sigma * z0
    return answer

def toy_ldm(side, target="v", answer=None, scale=1.0, D=1, widths=(16, 16)):
    """A LatentDiffusion of latents (D, side, side); its images are latents times scale."""
    echo = nn.Identity()
    echo.decode = echo.forward
    ae_cfg = ldm.AEConfig(size=2 * side, widths=(8, 8), z_channels=D)
    cfg = ldm.LDMConfig(widths=widths, layers=1, target=target)
    model = ldm.LatentDiffusion(cfg, ae_cfg, echo)
    for net in (model.unet, model.guide):
        shaken(net).forward = answer or net.forward
    model.std.fill_(scale)
    return model

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
    """Data N(0.3, std^2), whose best prediction is known: so are the samples. Finitely many steps
    lose up to 3 % of the deviation, 16384 values tell the mean to 0.03."""
    x = 100 * toy_ldm(32, "v", oracle("v", 0.3, std), 0.01).sample(16, 0, sampler, steps)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.05)
    assert float(x.std()) == pytest.approx(std, rel=0.03)

def test_dpm_is_closer_to_the_exact_solution_than_ddim():
    """For Gaussian data the ODE's solution is known; second order beats first order."""
    mean, std, trace, error = 0.1, 2.0, [], {}
    model = toy_ldm(16, "eps", oracle("eps", mean, std), 0.01)
    model.sample(1, 7, steps=1, trace=trace)
    alpha, sigma = alpha_sigma(999)
    z_T = trace[0][0]
    exact = mean + std * (z_T - alpha * mean) / (alpha ** 2 * std ** 2 + sigma ** 2) ** 0.5
    for sampler in ("ddim", "dpm"):
        error[sampler] = float((100 * model.sample(1, 7, sampler, 15) - exact).abs().mean())
    assert error["dpm"] < error["ddim"] / 3, error

def test_guidance_moves_away_from_the_early_unet():
    """A UNet that knows only images of 0.3; when it was young, it knew only those of 0.1."""
    model = toy_ldm(4, answer=oracle("v", 0.3, 0.0))
    model.guide.forward = oracle("v", 0.1, 0.0)
    images = [model.sample(1, 0), *[model.sample(1, 0, guidance=g) for g in (0.0, 1.0, 1.5)]]
    close(torch.cat(images).mean((1, 2, 3)), torch.tensor([0.4, 0.1, 0.3, 0.4]), atol=1e-4, rtol=0)

@each("t, t_next", [(999, 998), (500, 499), (1, 0), (999, 900), (400, 20)])
def test_ddpm_step_draws_from_the_textbook_posterior(t, t_next):
    """Mean and variance of q(z_next | z_t, z0) by Bayes' rule; for neighbours this is Eq. 7."""
    s, (z0, z_t, noise) = ldm.NoiseScheduler(), torch.randn(3, 1, 1, 4, 4).double()
    abar, abar_next = alpha_sigma(t)[0] ** 2, alpha_sigma(t_next)[0] ** 2
    a = abar / abar_next
    precision = a / (1 - a) + 1 / (1 - abar_next)  # of likelihood and prior
    mean = (a ** 0.5 / (1 - a) * z_t + abar_next ** 0.5 / (1 - abar_next) * z0) / precision
    close(s.ddpm_step(z0, z_t, t, t_next, noise), mean + noise * precision ** -0.5)

def test_dpm_step_equals_the_published_formula():
    """DPM-Solver++(2M) in the paper's letters: lambda, h, r, D; first and last step are DDIM's."""
    s, (z0, z_t, z0_before) = ldm.NoiseScheduler(), torch.randn(3, 1, 1, 4, 4).double()
    (alpha_b, sigma_b), (alpha, sigma), (alpha_t, sigma_t) = map(alpha_sigma, (950, 900, 800))
    h = math.log(alpha_t / sigma_t) - math.log(alpha / sigma)
    r = (math.log(alpha / sigma) - math.log(alpha_b / sigma_b)) / h
    second = (1 + 1 / (2 * r)) * z0 - 1 / (2 * r) * z0_before
    for previous, D in (((950, z0_before), second), (None, z0)):
        expected = sigma_t / sigma * z_t - alpha_t * (math.exp(-h) - 1) * D
        close(s.dpm_step(z0, z_t, 900, 800, previous), expected)
    close(s.dpm_step(z0, z_t, 30, -1, (60, z0_before)), z0)

# ---- 8. UNet, and the latent diffusion model ----------------------------------------------------
@each("channels, widths, downs, layers, side", [
    (4, (16, 24), 1, 1, (8, 8)), (3, (8, 16, 32), 2, 2, (8, 16)), (1, (8, 16, 24), 0, 1, (7, 5))])
def test_unet_knows_the_step_and_each_latent_alone(channels, widths, downs, layers, side):
    """At first it predicts a bias; then another t changes the answer, other latents do not."""
    unet, z = ldm.UNet(channels, widths, downs, layers), torch.randn(3, channels, *side)
    assert unet(z, torch.tensor([0, 5, 999])).std((0, 2, 3)).max() < 1e-6
    shaken(unet)
    early, late = (unet(z, torch.full((3,), t)) for t in (5, 800))
    assert early.shape == z.shape and (early - late).abs().mean() > 1e-3
    mixed = unet(z, torch.tensor([5, 800, 800]))
    close(mixed, torch.cat([early[:1], late[1:]]), atol=1e-5, rtol=1e-4)

@each("cut_mid", [False, True])
def test_every_weight_matters_and_skips_carry_what_the_middle_does_not(cut_mid):
    """All weights get a gradient; without the middle all but its own and those just before it."""
    unet, z = shaken(ldm.UNet(2, (16, 24, 24), 2, 1)), torch.randn(2, 2, 8, 8)
    assert sum(isinstance(m, ldm.Attention) for m in unet.modules()) == 5
    if cut_mid:
        unet.mid.forward = always(torch.randn(2, 24, 2, 2))
    unet(z, torch.tensor([5, 800])).square().mean().backward()
    still = {name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()}
    assert bool(still) == cut_mid and all(n.startswith(("mid.", "down_blocks.1.")) for n in still)

@each("side, smallest", [(32, 4), (8, 4), (7, 7), (6, 6), (12, 6)])
def test_unet_halves_latents_to_four_if_it_can(side, smallest, monkeypatch):
    model, seen = toy_ldm(side, widths=(8,) * 5), spy(monkeypatch, ldm.MidBlock, "forward")
    model.unet(torch.zeros(1, 1, side, side), torch.tensor([3]))
    assert seen[0][1].shape[2:] == (smallest, smallest)

def test_latents_are_normalised_and_taken_back_before_decoding():
    """z0 has mean 0 and deviation 1 per channel, also a flat one; decode clamps images."""
    model = toy_ldm(8, D=3)
    z = torch.randn(50, 3, 8, 8) * torch.tensor([0.1, 0.02, 0])[:, None, None] + 0.3
    model.measure(z)
    z0 = model.normalise(z)
    std, mean = torch.std_mean(z0[:, :2], (0, 2, 3))
    assert mean.abs().max() < 1e-4 and (std - 1).abs().max() < 1e-4 and z0.isfinite().all()
    close(model.decode(z0), z)
    assert model.decode(z0 + 1e3).max() == 1

@each("sampler", ["ddpm", "ddim", "dpm"])
def test_sampled_image_does_not_depend_on_n_or_batch(sampler):
    """Image i is the same in any company; another seed or index is another image."""
    model = toy_ldm(8, scale=0.1)
    x = model.sample(5, 3, sampler, 4, batch=2)
    assert x.shape == (5, 1, 8, 8) and not x.requires_grad
    close(x[:3], model.sample(3, 3, sampler, 4), atol=1e-4, rtol=0)
    images = torch.cat([x, model.sample(2, 4, sampler, 4)]).flatten(1)
    assert (torch.cdist(images, images) + torch.eye(7)).min() > 0.1

def test_unknown_names_are_refused():
    with refused("DDIM"):
        toy_ldm(4).sample(1, 0, sampler="DDIM")
    with pytest.raises(KeyError, match="x0"):
        toy_ldm(4, target="x0").sample(1, 0)

# ---- 9. Runs ------------------------------------------------------------------------------------
@each("stage, term", [("ae", "recon"), ("ldm", "loss")])
def test_run_folder_has_what_was_asked_for(train, stage, term):
    """Rows every 100 steps (here 2), means of these; pictures every --save-every; curves."""
    ckpt = train(stage, steps=7, save_every=3, accum=2)
    assert ckpt["step"] == ckpt["parts"]["opt"]["state"][0]["step"] == 7
    assert [row["step"] for row in ckpt["log"]] == [2, 3, 4, 6, 7]
    names = [f"pictures/{stage}-00000{step}.png" for step in (3, 6, 7)]
    assert sorted(map(str, Path("new").glob(f"*/{stage}-*"))) == [f"new/{name}" for name in names]
    for name in (*names, f"{stage}-curves.png"):
        assert len(Image.open(f"new/{name}").convert("L").getcolors()) > 2
    single = train(stage, "b", steps=7, log_every=1, accum=2)["log"]
    means = [single[0][term] + single[1][term], single[3][term] * 2]
    assert [2 * ckpt["log"][i][term] for i in (0, 2)] == pytest.approx(means)

def test_log_keeps_no_graph():
    """What a loss needs for its gradient is freed, though its value waits for the next row."""
    run, w = ldm.Run(ldm.AEConfig(out="new"), "ae", {}), torch.ones(3, requires_grad=True)
    run.step = 9001  # --steps may be lowered
    assert next(run.steps(), "done") == "done" and ldm.Run.stopping is None
    run.add({"loss": w.square().sum()})
    alive = weakref.ref(w)
    del w
    assert alive() is None

@each("stage, settings", [
    ("ae", dict(accum=2)), ("ae", dict(ae="kl", gan_weight=1.0, disc_start=1)), ("ldm", {}),
    ("ldm", dict(accum=2, target="eps", flip=False)), ("ldm", dict(amp="fp16"))], ids=str)
def test_stopped_and_resumed_equals_one_go(train, stage, settings, monkeypatch):
    """Two steps, then two more, from one checkpoint, twice: bit for bit those of four steps."""
    once, path = train(stage, "once", **settings), Path(f"new/{stage}.pt")
    signal_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train(stage, **settings)
    older = path.read_bytes()
    for _ in range(2):
        path.write_bytes(older)
        twice = train(stage, **settings)
        assert once["log"] == twice["log"]
        parts = [[part.get("state", part) for part in ckpt["parts"].values()]
                 for ckpt in (once, twice)]  # networks, and the state of optimisers
        close(*parts, rtol=0, atol=0)

@each("number", SIGNALS)
def test_a_signal_saves(train, monkeypatch, number):
    """Ctrl-C, kill and a closed terminal save one step later and exit with code 130."""
    signal_at(monkeypatch, 2, number)
    for stage in ("ae", "ldm"):
        with pytest.raises(KeyboardInterrupt):
            train(stage, steps=8)
        assert load(f"new/{stage}.pt")["step"] == 3
    assert train("ldm", steps=8)["step"] == 8

def test_nohup_survives_the_closed_terminal_and_threads_can_train(train, monkeypatch, faces):
    """An ignored SIGHUP stays ignored; only the main thread can have signal handlers."""
    signal.signal(SIGNALS[2], signal.SIG_IGN)
    signal_at(monkeypatch, 1, SIGNALS[2])
    assert train("ae", steps=3)["step"] == 3
    cfg = ldm.resolve(ldm.AEConfig, TINY["ae"] | dict(data=str(faces), out="other"))
    thread = threading.Thread(target=ldm.train_ae, args=(cfg,))
    thread.start()
    thread.join()
    assert load("other/ae.pt")["step"] == 4

@each("stage", ["ae", "ldm"])
def test_resuming_refuses_other_settings_but_not_those_that_change_nothing(train, out, stage):
    path, content = out / f"{stage}.pt", torch.load(out / f"{stage}.pt")
    (ckpt,) = content.values()
    config, free = ckpt["config"], "out data data_root steps amp compile save_every"
    for name in set(config) - set(free.split()):
        ckpt["config"] = config | {name: "other"}
        torch.save(content, path)
        before = path.read_bytes()
        with refused(name.replace("_", "[-_]")):
            train(stage, "out", steps=9)
        assert path.read_bytes() == before, name
    ckpt["config"] = config | dict.fromkeys(free.split(), "other")
    torch.save(content, path)
    assert train(stage, "out", steps=6, amp="fp16")["step"] == 6

def test_other_pictures_are_refused_wherever_they_would_mix(train, out, faces):
    """One photo more, one less: held-out ones would be trained on. A copy is welcome."""
    for name in ("copy", "more", "less"):
        shutil.copytree(faces, name)
    shutil.copy("more/00.png", "more/new.png")
    os.remove("less/00.png")
    for stage in ("ae", "ldm"):
        train(stage, "out", data="copy")
    latents = (out / "latents.pt").read_bytes()
    for data in ("more", "less"):
        for stage in ("ae", "ldm"):
            with refused("data"):
                train(stage, "out", data=data, steps=9)
        with refused("data"):
            figures(out, data=data)
    with refused("lr"):
        train("ldm", "out", lr=1.0)
    assert (out / "latents.pt").read_bytes() == latents  # nothing was encoded before

def test_damaged_and_foreign_checkpoints_are_refused(train, out):
    """Cut off, of the other stage, of another program, no archive, code: one sentence each."""
    path, whole = out / "ae.pt", (out / "ae.pt").read_bytes()
    torch.save({"state_dict": torch.zeros(2)}, "foreign")
    code = b"cos\nmkdir\n(S'trap'\ntR."  # a pickle that would make a folder
    for bad in (whole[:len(whole) // 2], b"", b"<html>", code, Path("foreign").read_bytes(),
                (out / "ldm.pt").read_bytes()):
        path.write_bytes(bad)
        for stage in ("ae", "ldm"):
            with refused(re.escape(str(path))):
                train(stage, "out", steps=9)
        assert path.read_bytes() == bad
    assert not Path("trap").exists()

@contextlib.contextmanager
def full_disk(size):
    """No file can get longer than `size` bytes."""
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_full_disk_costs_nothing_that_was_there(train, out):
    """What cannot be written whole is not written; the checkpoint before it is used later on."""
    draw(out)
    before = {path: path.read_bytes() for path in out.rglob("*.p*")}  # .pt and .png
    for stage in ("ae", "ldm"):
        for size in (20_000, 100):
            with full_disk(size), refused("File too large"):
                train(stage, "out", steps=6)
    with full_disk(1000), refused("File too large"):
        draw(out, seed=1)
    assert {path: path.read_bytes() for path in out.rglob("*.p*")} == before
    assert train("ae", "out", steps=6)["step"] == 6 and not [*out.rglob("*.tmp")]

@each("stage", ["ae", "ldm"])
def test_what_is_not_finite_is_never_saved(train, out, monkeypatch, stage):
    """A loss, or weights that a gradient has spoilt: the last good checkpoint is still there."""
    def infinite(parameters, _):
        for p in parameters:
            p.grad.fill_(math.inf)
    before = (out / f"{stage}.pt").read_bytes()
    for owner, name, function in ((ldm.F, "mse_loss", lambda a, b: (a - b).sum() * math.nan),
                                  (nn.utils, "clip_grad_norm_", infinite)):
        with monkeypatch.context() as patch, refused("step 5"):
            patch.setattr(owner, name, function)
            train(stage, "out", steps=5)
    assert (out / f"{stage}.pt").read_bytes() == before

# ---- 10. Training, what both stages share -------------------------------------------------------
@each("steps", [1, 9, 3000, 100000])
def test_learning_rate_rises_stays_and_falls_to_nothing(steps):
    """At its highest for about half of the training, never 0 or above lr."""
    rates = [ldm.learning_rate(ldm.AEConfig(steps=steps, lr=2.0), s) for s in range(1, steps + 1)]
    top = [i for i, rate in enumerate(rates) if rate == 2]
    assert rates == sorted(rates[:top[0]]) + [2.0] * len(top) + sorted(rates[top[-1] + 1:])[::-1]
    assert all(0 < rate <= 2 for rate in rates)
    if steps > 1000:
        assert top[0] < 500 and 0.4 < len(top) / steps < 0.6 and max(rates[::steps - 1]) < 0.02

def test_gradients_are_unscaled_then_clipped_and_an_overflow_costs_a_step():
    """fp16 scales them by 1024: norm 0.5 moves a weight by 0.5 lr, norm 100 by lr, inf not."""
    net, scaler = nn.PReLU(), torch.amp.GradScaler("cpu", init_scale=1024.0)  # of one weight
    optimiser = torch.optim.SGD(net.parameters(), lr=9.0)
    for slope, moved in ((0.5, 0.05), (100, 0.1), (math.inf, 0)):
        before = net.weight.item()
        scaler.scale(slope * net.weight.sum()).backward()
        ldm.optimise(scaler, optimiser, net, 0.1)
        scaler.update()
        assert before - net.weight.item() == pytest.approx(moved, abs=1e-6)
        assert net.weight.grad is None

def test_ema_warms_up_then_keeps_its_limit():
    for step, decay in ((0, 0.1), (90, 0.91), (10 ** 6, 0.995)):
        ema, model = nn.PReLU(init=1.0), nn.PReLU(init=0.0)
        ldm.update_ema(ema, model, step)
        assert ema.weight.item() == pytest.approx(decay) and model.weight.item() == 0

@each("offset, spread", [(0, 1), (30, 2), (100, 0), (30, 1e-4)])
def test_compiling_changes_neither_answers_nor_gradients_nor_names(monkeypatch, offset, spread):
    """On a GPU norms become one-pass ones: equal also far from 0, finite for flat groups."""
    monkeypatch.setattr(nn.Module, "compile", always(None))
    nets, results = [nn.Sequential(nn.GroupNorm(8, 64)) for _ in range(2)], []
    nets[1].load_state_dict(shaken(nets[0]).state_dict())
    values = offset * torch.rand(40, 1, 1, 1) + spread * torch.randn(40, 64, 6, 10)
    ldm.compile_network(nets[0], ldm.LDMConfig(), CPU)
    for net, on, kind in zip(nets, (False, True), (nn.GroupNorm, ldm.OnePassGroupNorm)):
        ldm.compile_network(net, ldm.LDMConfig(compile=on), torch.device("cuda"))
        assert type(net[0]) is kind
        x = values.clone().requires_grad_()
        y = net(x)
        (y * values.cos()).sum().backward()  # some slope or other
        assert y.isfinite().all() and x.grad.isfinite().all()
        grads = {name: p.grad for name, p in net.named_parameters()}
        results.append([y] + [grads, x.grad] * bool(spread))
    if spread != 1e-4:  # there all digits are rounding
        close(*results, rtol=1e-3, atol=1e-2)

# ---- 11. Stage 1: the autoencoder ---------------------------------------------------------------
@each("stage, term, settings", [
    ("ae", "recon", {}), ("ae", "recon", dict(ae="kl", amp="bf16")),
    ("ae", "recon", dict(channels=1, amp="fp16", steps=40)),
    ("ldm", "loss", dict(amp="fp16")), ("ldm", "loss", dict(target="eps"))], ids=str)
def test_both_stages_learn(train, stage, term, settings):
    """The loss falls within 60 steps; half precision does not get into the weights."""
    ckpt = train(stage, log_every=20, **dict(steps=60) | settings)
    assert ckpt["log"][-1][term] < 0.85 * ckpt["log"][0][term]
    assert all(w.dtype == torch.float32 for w in ckpt["parts"]["net"].values())

@each("data, flip", [("faces", True), ("faces", False), ("toyfaces", True)])
def test_stage_1_sees_the_training_images_and_no_others(train, monkeypatch, data, flip, faces):
    """Never a held-out one; all of a small folder; with --flip each is mirrored on its own."""
    if data == "toyfaces":
        monkeypatch.setattr(ldm, "toyfaces", always(ldm.toyfaces(range(1000), 16)))
    seen = spy(monkeypatch, ldm.VQVAE, "forward")
    data = {"faces": str(faces)}.get(data, data)
    cfg = ldm.AEConfig(**train("ae", steps=10, batch=100, flip=flip, data=data)["config"])
    images, held = [ldm.to_float(part, CPU) for part in ldm.load_images(cfg)]
    batches, upright = [keys(x) for _, x in seen], keys(images)
    got, allowed = set().union(*batches), upright | (keys(images.flip(3)) if flip else set())
    assert got <= allowed and not got & keys(held)
    assert got == allowed or data == "toyfaces"
    assert not flip or all(0 < len(batch & upright) < len(batch) for batch in batches)

@each("stage, owner, name", [("ae", ldm.VQVAE, "forward"),
                             ("ldm", ldm.NoiseScheduler, "add_noise")])
def test_every_batch_is_another_one(train, monkeypatch, stage, owner, name):
    """From step to step, within --accum, and for another seed; the same seed repeats all."""
    seen = spy(monkeypatch, owner, name)
    for folder, seed in (("a", 0), ("b", 1), ("c", 0)):
        train(stage, folder, accum=2, seed=seed)
    batches = [[x.numpy().tobytes() for x in args[1:]] for args in seen]
    assert batches[:8] == batches[16:]
    for kind in zip(*batches[:16]):  # images; or latents, noise and t
        assert len(set(kind)) == 16

def test_held_psnr_is_that_of_the_checkpoint_on_held_out_images(train):
    ckpt = train("ae", steps=30, log_every=30)
    ae, cfg = ldm.load_autoencoder(Path("new/ae.pt"), CPU)
    x = ldm.to_float(ldm.load_images(cfg)[1], CPU)
    mse = (ae.decode(ae.encode(x)).clamp(-1, 1) - x).square().mean((1, 2, 3))
    assert abs(ckpt["log"][-1]["held_psnr"] - float(10 * (4 / mse).log10().mean())) < 1e-3
    z, picture = ae.encode(x), pixels("new/pictures/ae-000030.png")
    rows = torch.cat([x, ae.decode(z), ldm.latent_picture(z, 16)])
    assert np.abs(picture - np.asarray(ldm.image_grid(rows, 4))).max() <= 1
    assert abs(ckpt["log"][-1]["z_std"] - z.std()) < 1e-3 and not z.requires_grad
    assert ldm.psnr(x, x).isfinite().all()
    picture = picture[2:98:6, 2:98:6]  # 16 pixels, times 6
    assert np.abs(picture - (x[0].permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 0.5

@pytest.fixture
def no_chance(monkeypatch):
    """Without noise, random steps and clipping, so that gradients can be compared."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.full(size, high // 2))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(size))
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", always(None))

def first_gradient(ckpt, *optimisers):
    """From Adam's first moments after one step: in proportion to the gradient of each weight."""
    return torch.cat([s["exp_avg"].flatten() for opt in optimisers
                      for s in ckpt["parts"][opt]["state"].values()])

@each("kind, term, unit", [("vq", "codebook", 1), ("vq", "commit", 1), ("kl", "kl", 1),
                           ("kl", "perceptual", 1), ("kl", "gan", 1000)])  # a ramp
def test_each_weight_scales_its_gradient(train, no_chance, monkeypatch, kind, term, unit):
    """0 is none, ten times is ten times; the GAN's weight also falls with the learning rate."""
    off = dict(codebook_weight=0, commit_weight=0, kl_weight=0, disc_start=0)
    def gradient(weight, rate=1):
        monkeypatch.setattr(ldm, "learning_rate", lambda cfg, step: rate * cfg.lr)
        ckpt = train("ae", f"{weight}", ae=kind, steps=1, **off | {f"{term}_weight": weight})
        return first_gradient(ckpt, "opt")
    none, one, ten = gradient(0), gradient(unit), gradient(10 * unit, rate=0.5)
    times = 5 if term == "gan" else 10
    assert 1e-6 < (one - none).norm() < 100
    assert (ten - none - times * (one - none)).norm() < 1e-2 * (ten - none).norm()

GAN = dict(ae="kl", gan_weight=500.0, disc_start=0)

@each("stage, optimisers, settings", [("ae", ["opt", "opt_d"], GAN), ("ldm", ["opt"], {})])
def test_accumulated_gradients_are_averaged(train, no_chance, stage, optimisers, settings):
    """Three times the same batch is the gradient of one: also for the discriminator."""
    once, thrice = (first_gradient(train(stage, f"{n}", steps=1, accum=n, **settings), *optimisers)
                    for n in (1, 3))
    assert once.abs().max() > 1e-3
    close(once, thrice, atol=1e-6, rtol=1e-3)

@each("recon, value", [("l1", 0.3), ("l2", 0.09)])
def test_reconstruction_loss_is_the_mean_error(train, monkeypatch, recon, value):
    def forward(self, x):
        return x + 0.3 + 0 * self.decoder[0].bias.sum(), {}
    monkeypatch.setattr(ldm.VAE, "forward", forward)
    (row,) = train("ae", ae="kl", recon=recon, steps=1)["log"]
    assert row["recon"] == pytest.approx(value, rel=1e-4)

def test_codes_restart_once_per_hundred_steps(train, monkeypatch):
    """Also with --accum: a second restart in the same step would move codes that are in use."""
    calls = spy(monkeypatch, ldm.VQVAE, "restart_codes")
    train("ae", accum=2, batch=1, steps=102, log_every=102)
    assert [len(z_e) for _, z_e in calls] == [1, 1]

@each("learner", ["discriminator", "autoencoder"])
def test_each_side_of_the_gan_gets_better_alone(train, monkeypatch, learner):
    """Against a frozen autoencoder, D(real) nears 1 and D(fake) 0; it would be 2/3 or more if the
    generator's gradient stayed in it. Against a frozen discriminator the scores of fakes rise."""
    def only_one(scaler, optimiser, net, lr):
        if isinstance(net, ldm.PatchGAN) == (learner == "discriminator"):
            optimise(scaler, optimiser, net, lr)
        optimiser.zero_grad()
    optimise = ldm.optimise
    monkeypatch.setattr(ldm, "optimise", only_one)
    log = train("ae", **GAN, gan="lsgan", steps=60, log_every=10)["log"]
    if learner == "discriminator":
        assert abs(log[-1]["score_fake"]) < 0.3 and log[-1]["score_real"] > 0.7
    else:
        assert log[-1]["score_fake"] > log[0]["score_fake"] + 0.1

def test_adversarial_loss_joins_in_after_disc_start(train):
    ckpt = train("ae", **GAN | {"disc_start": 2}, log_every=1)
    assert ["gan" in row for row in ckpt["log"]] == [False, False, True, True]
    assert ckpt["parts"]["opt_d"]["state"][0]["step"] == 2
    for opt in ("opt", "opt_d"):
        (group,) = ckpt["parts"][opt]["param_groups"]
        assert (group["lr"], group["betas"]) == (TINY["ae"]["lr"] / 2, (0.5, 0.9))

def test_pictures_of_one_colour_train_without_nan(train):
    """Stages, samples and figures stay finite; eval finds the pictures from any folder."""
    Path("flat").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), "red").save(f"flat/{i}.png")
    for stage in ("ae", "ldm"):
        log = train(stage, data="flat")["log"]
        assert all(math.isfinite(value) for row in log for value in row.values())
    os.chdir("flat")
    assert all(map(math.isfinite, figures("../new").values())) and not Path("data").exists()

# ---- 12. Stage 2: diffusion on the latents ------------------------------------------------------
def test_unet_learns_from_normalised_latents_each_with_its_own_t_and_noise(train, monkeypatch):
    """All 36 images and their mirror images, mean 0, deviation 1; t from 0 to T-1."""
    seen = spy(monkeypatch, ldm.NoiseScheduler, "add_noise")
    highs = spy(monkeypatch, torch, "randint")
    train("ldm", batch=200)
    assert {high for high, _ in highs} == {72, 1000}
    _, *parts = zip(*seen)
    z0, eps, t = map(torch.cat, parts)
    std, mean = torch.std_mean(z0, (0, 2, 3))
    assert len(keys(z0)) == 72 and mean.abs().max() < 0.1 and (std - 1).abs().max() < 0.1
    assert len(keys(eps)) == 800 and abs(eps.std() - 1) < 0.02 and abs(eps.mean()) < 0.02
    assert len(t.unique()) > 400 and t.min() < 30 and t.max() > 970

def test_average_of_the_unet_is_kept_and_is_what_samples(train, monkeypatch):
    """After each step the average moves; load_ldm gives it, frozen, and not the last weights."""
    calls = spy(monkeypatch, ldm, "update_ema")
    last, model = train("ldm", steps=10)["parts"]["net"], ldm.load_ldm("new/ldm.pt", CPU)
    (ema, net, _), (guide, *_) = calls[-1], calls[1]
    for average, steps in ((ema, 10), (guide, 2)):  # the weaker one stays behind
        assert [step for a, _, step in calls if a is average] == [*range(1, steps + 1)]
    (group,) = load("new/ldm.pt")["parts"]["opt"]["param_groups"]
    assert (group["lr"], group["betas"]) == (TINY["ldm"]["lr"] / 5, (0.9, 0.99))
    for a, b in ((net, last), (model.unet, ema.state_dict()), (model.guide, guide.state_dict()),
                 (model.ae, load("new/ae.pt")["parts"]["net"])):
        close(a.state_dict(), b, rtol=0, atol=0)
    assert not torch.equal(last["conv_in.weight"], model.unet.conv_in.weight)
    assert not any(p.requires_grad for p in model.parameters())

@each("target", ["v", "eps"])
def test_loaded_model_makes_the_pictures_that_training_made(train, target):
    """With the mean and std of the latents, the target, the seed and the averaged weights."""
    train("ldm", target=target, seed=3)
    model = ldm.load_ldm("new/ldm.pt", CPU)
    picture = np.asarray(ldm.image_grid(model.sample(16, 3), 8))
    assert np.abs(pixels("new/pictures/ldm-000004.png") - picture).max() <= 1
    (z,) = load("new/latents.pt").values()
    std, mean = torch.std_mean(z.float(), (0, 2, 3), keepdim=True)
    close([model.mean, model.std], [mean, std])

def test_latents_are_those_of_these_images_and_this_autoencoder(train, monkeypatch):
    """Mirrored images are encoded as well; what changed is encoded anew, what did not is not."""
    def encoded(images, flip=False, ae_fingerprint="name"):
        calls.clear()
        cfg = ldm.LDMConfig(out="new", flip=flip, ae_fingerprint=ae_fingerprint)
        z, x = ldm.load_latents(cfg, ae, images, CPU, None), ldm.to_float(images, CPU)
        n = sum(len(x) for _, x in calls)
        close(z, ae.encode(torch.cat([x, x.flip(3)]) if flip else x).half(), atol=1e-2, rtol=1e-2)
        return n
    ae, _ = ldm.load_autoencoder(train.root / "ae/ae.pt", CPU)
    images, calls = ldm.toyfaces(range(20), 16), spy(monkeypatch, ldm.VQVAE, "encode")
    others = images.flip(0)
    assert [encoded(images), encoded(images), encoded(others)] == [20, 0, 20]
    counts = [encoded(others, True), encoded(others, True), encoded(others, True, "b")]
    assert counts == [40, 0, 40] and len(load("new/latents.pt")) == 1

def test_another_autoencoder_needs_another_unet(train, out):
    old = (out / "latents.pt").read_bytes()
    train("ae", "out", steps=6)
    with refused("ldm.pt"):
        train("ldm", "out", steps=6)
    assert (out / "latents.pt").read_bytes() == old
    (out / "ldm.pt").unlink()
    train("ldm", "out")
    assert (out / "latents.pt").read_bytes() != old

# ---- 13. Sampling and evaluation ----------------------------------------------------------------
@each("sampler", ["ddpm", "ddim", "dpm"])
def test_sample_writes_what_it_was_asked_for(out, sampler):
    """n, seed, sampler and steps are obeyed; progress.png ends with the result."""
    model = ldm.load_ldm(out / "ldm.pt", CPU)
    for steps in (6, 1):
        draw(out, n=11, seed=5, sampler=sampler, steps=steps, batch=9, guidance=9)
        grid, strip = pixels(out / "samples.png"), pixels(out / "progress.png")
        trace = []
        images = model.sample(11, 5, sampler, steps, trace=trace, guidance=9)
        expected = np.asarray(ldm.image_grid(images, 4))
        assert np.abs(grid - expected).max() <= 1 and len(strip) == 8 * 98 + 2
        assert np.abs(strip[-98:-2, -98:] - grid[2:98, -98:]).max() <= 1  # 96 pixels and a frame
        first = [ldm.latent_picture(trace[0][0], 16), *map(model.decode, trace[0])]
        assert np.abs(strip[:98] - np.asarray(ldm.image_grid(torch.cat(first), 12))[:98]).max() <= 1

def test_the_newest_run_is_taken_unless_one_is_named():
    """The one touched last under runs/; eval also takes a run that has only stage 1 yet."""
    for i, name in enumerate(("runs/old/ae", "runs/old/ldm", "runs/new/ldm", "runs/young/ae")):
        path = Path(f"{name}.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9 + i, 1e9 + i))
    newest, old = (ldm.resolve(ldm.SampleConfig, given) for given in ({}, {"data": "old"}))
    assert ldm.find_checkpoint(newest, "ldm") == Path("runs/new/ldm.pt")
    assert ldm.find_checkpoint(newest, "ae", "ldm") == Path("runs/young/ae.pt")
    assert ldm.find_checkpoint(old, "ae", "ldm") == Path("runs/old/ldm.pt")

def test_frechet_distance_of_known_gaussians():
    """Zero for equal features, and the closed form for exactly Gaussian moments."""
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

def vgg_features(vgg, x):
    """relu5_3 of VGG16 with these weights, averaged over the positions: (N, 512)."""
    net = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=False)
    net.load_state_dict({name.removeprefix("features."): w for name, w in vgg.items()})
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        return net[:30](((x + 1) / 2 - mean) / std).mean((2, 3))

def test_every_figure_of_eval_is_what_its_name_says(out, vgg, capsys):
    """PSNR, LPIPS and Frechet distances to the held-out images, by hand."""
    table = figures(out, seed=5, sampler="ddim")
    printed = capsys.readouterr().out
    model, lpips = ldm.load_ldm(out / "ldm.pt", CPU), ldm.LPIPS(ldm.LPIPS_WEIGHTS, vgg)
    x = ldm.to_float(ldm.load_images(model.ae_cfg)[1], CPU)
    x_rec = model.ae.decode(model.ae.encode(x)).clamp(-1, 1)
    real, fake = vgg_features(vgg, x), vgg_features(vgg, model.sample(4, 5, "ddim", 3))
    expected = {
        "PSNR": -10 * ((x_rec - x).square().mean((1, 2, 3)) / 4).log10().mean(),
        "LPIPS": lpips(x_rec, x).mean(),
        "reconstructions": ldm.frechet_distance(vgg_features(vgg, x_rec), real),
        "4 samples (ddim, 3 steps)": ldm.frechet_distance(fake, real)}
    assert len(table) == 4 and all(name in printed for name in table)
    for word, value in expected.items():
        (got,) = (value for name, value in table.items() if word in name)
        assert got == pytest.approx(float(value), rel=1e-2), word

def test_eval_obeys_its_settings(out):
    """Another seed, sampler, guidance, number of steps or images: other samples, and only those."""
    changes = ({}, dict(seed=1), dict(sampler="ddpm"), dict(steps=20), dict(n=1), dict(guidance=3))
    tables = [list(figures(out, **change).values()) for change in changes]
    assert all(math.isfinite(value) for table in tables for value in table)
    assert len({last for *_, last in tables}) == 6 and len({tuple(t[:-1]) for t in tables}) == 1
    (out / "ldm.pt").unlink()  # then the autoencoder alone
    assert list(figures(out).values()) == tables[0][:-1]

# ---- 14. Command line ---------------------------------------------------------------------------
@each("line, word", [
    ("sample", "--out"), ("eval --out nowhere", "nowhere"), ("train-ldm --out nowhere", "nowhere"),
    ("sample --data nope", "nope"), ("train-ae --data nope", "nope"), ("train-ae --data .", "data"),
    ("train-ae --data celebhq", "--data celebhq"), ("train-ae --batch 1000000000", "--batch"),
    ("train-ae --size 30 --widths 8 16 32", "--size 30"),
    ("sample --steps 1001", "--steps 1001"), ("train-ae --lr nan", "--lr nan"),
    ("demo --seed -3", "--seed -3"), ("train-ae --perceptual-weight 1", "vgg16")])
def test_mistakes_cost_one_sentence_and_create_nothing(monkeypatch, line, word):
    """Exit code 2 and a line that names the flag: no traceback, no files."""
    monkeypatch.setattr(models.VGG16_Weights, "get_state_dict", None)
    noise = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)  # quicker than faces
    monkeypatch.setattr(ldm, "toyfaces", always(noise))
    with refused(word):
        command(*line.split())
    assert not os.listdir()

@each("command", ldm.COMMANDS)
def test_help_lists_every_flag_with_its_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        ldm.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in flags(ldm.COMMANDS[command][0]):
        assert f"--{f.name}".replace("_", "-") in text, f.name
        assert f"{f.metadata['help']} (default: {f.default}" in text, f.name

@each("error, word", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "error: .*--batch"),
    (MemoryError(), "error: .*--batch"), (OSError(28, "No space left"), "error: .*No space left"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "^mat1 and mat2")])
def test_exhausted_memory_and_disks_are_one_sentence(monkeypatch, error, word):
    """PyTorch's long message becomes advice; other errors of PyTorch stay visible."""
    def fail(cfg):
        raise error
    monkeypatch.setitem(ldm.COMMANDS, "sample", (ldm.SampleConfig, fail, ""))
    with pytest.raises((ldm.UserError, RuntimeError), match=word):
        command("sample")

def test_demo_runs_both_stages_and_samples(monkeypatch):
    ran = []
    for name in ("train_ae", "train_ldm", "sample"):
        monkeypatch.setattr(ldm, name, ran.append)
    assert ldm.main(["demo", "--seed", "3"]) == 0
    assert list(map(type, ran)) == [ldm.AEConfig, ldm.LDMConfig, ldm.SampleConfig]
    assert {(cfg.seed, cfg.out) for cfg in ran} == {(3, "runs/toyfaces")} and ran[2].n == 64

# ---- README -------------------------------------------------------------------------------------
def readme_commands():
    """Every `python ldm.py ...` in the README's code blocks."""
    for language, block in re.findall(r"```(\w*)\n(.*?)```", README, re.S):
        if language != "python":
            yield from re.findall(r"python ldm\.py ([a-z][^#;&|>)\n]+)", block)

@each("line", sorted(set(readme_commands())))
def test_readme_commands_are_accepted(line):
    given = vars(ldm.build_parser().parse_args(line.split()))
    ldm.resolve(ldm.COMMANDS[given.pop("command")][0], given)

def test_readme_notebook_cell_runs(monkeypatch):
    noise = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8)  # quicker than faces
    monkeypatch.setattr(ldm, "toyfaces", always(noise))
    for cell in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(cell, {})
    assert {path.name for path in Path().rglob("*.pt")} == {"ae.pt", "ldm.pt", "latents.pt"}

@each(ids="abcdefgh", argnames="name, graders", argvalues=[
    ("quantise", "quantiser"), ("add_noise", "inverts"), ("z0_and_eps", "inverts samplers"),
    ("ddim_step", "samplers"), ("generator_loss", "gan_losses"), ("sinusoids", "sinusoids"),
    ("discriminator_loss", "gan_losses"), ("learning_rate", "learning_rate_rises")])
def test_homework_fails_its_own_tests_and_no_others(monkeypatch, name, graders):
    """With one body blanked by the README's script, the tests that it names fail, others pass."""
    class Plugin:
        def pytest_runtest_logreport(self, report):
            failed.update(word for word in graded if report.failed and word in report.nodeid)
    graded, script = re.search(r"grades them: (.*?)\n\n```\n(.*?)```", README, re.S).groups()
    graded, failed = re.findall("`(.+?)`", graded), set()
    Path("ldm.py").write_text(TEXT)
    exec(re.sub(f'blank = ".*{name}.*"', f'blank = "{name}"', script), {})
    blanked = {"__name__": "blanked", "__file__": ldm.__file__}
    exec(Path("ldm.py").read_text(), blanked)
    owner = next((k for k in ("VQVAE", "NoiseScheduler") if hasattr(blanked[k], name)), None)
    theirs = getattr(blanked[owner], name) if owner else blanked[name]
    monkeypatch.setattr(getattr(ldm, owner) if owner else ldm, name, theirs)
    words = f"({' or '.join(graded)}) and not homework and not reproduce"
    pytest.main([__file__, "-qq", "--tb=no", "-pno:cacheprovider", "-k", words], [Plugin()])
    assert failed == set(graders.split()), "not blanked, or not graded by these tests alone"

def test_readme_shows_small_pictures_that_exist():
    """And no others lie in assets; they take less than 1 MB in all."""
    pictures = set(re.findall(r"assets/[\w.-]+", README))
    assert pictures and sum((HERE / p).stat().st_size for p in pictures) < 1_000_000
    assert {f"assets/{p.name}" for p in (HERE / "assets").iterdir()} == pictures

@each("sections, use", [
    ((1, 2), "VQVAE(3, (8, 16), 1, 4, 16)(x)[0]"), ((1, 2), "VAE(3, (8, 16), 1, 4)(x)[0]"),
    ((3,), "LPIPS(weights, vgg)(x, -x)"), ((4,), "PatchGAN()(x)"),
    ((5,), "NoiseScheduler().ddim_step(z, z, 5)"), ((1, 6), "UNet(4, (8, 16), 1, 1)(z, t)")])
def test_each_class_can_be_copied_out_of_the_file(sections, use, vgg):
    """With the usual imports and at most the blocks of section 1, it works in another file."""
    imports, *parts = re.split(r"^# ---- \d+\. .*$", TEXT, flags=re.M)
    names = dict(x=torch.randn(2, 3, 32, 32), z=torch.randn(2, 4, 8, 8), t=torch.tensor([3, 9]),
                 weights=ldm.LPIPS_WEIGHTS, vgg=vgg)
    exec(imports + "".join(parts[k - 1] for k in sections), names)
    assert eval(use, names).isfinite().all()
