"""Tests of ldm.py, in the order of its sections: each block, loss and sampler against a formula or
a brute-force reference, the data loader against a zoo of pictures, then training, resuming and the
command line with tiny networks. CPU only, no network, nothing outside the repository.

  python -m pytest -q test_ldm.py     # about 50 seconds on two CPU cores
"""
import ast, csv, math, os, re, shutil, signal, subprocess, sys, time, zlib
from dataclasses import fields
from functools import partial
from pathlib import Path
from urllib.error import URLError

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; on a busy machine threads only wait
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import models

import ldm

HERE = Path(ldm.__file__).resolve().parent
CPU = torch.device("cpu")
AE = ("--size 16 --widths 8 16 --layers 1 --z-channels 2 --codebook-size 16 --batch 4 --warmup 1 "
      "--perceptual-weight 0 --gan-weight 0 --lr 2e-3 --device cpu").split()
LDM = "--widths 16 24 --downs 1 --layers 1 --batch 8 --warmup 1 --lr 2e-3 --device cpu".split()

# ---- Helpers ------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder with fixed random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A folder of 40 PNGs (20x20): 36 to train on, 4 held out."""
    folder = tmp_path_factory.mktemp("faces")
    for i, face in enumerate(ldm.toyfaces(range(40), 20)):
        Image.fromarray(face.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    return folder

@pytest.fixture(scope="module")
def train(faces, tmp_path_factory):
    """train(command, out, flags...) runs a tiny training on the faces, returns the exit code."""
    root = str(tmp_path_factory.mktemp("data"))
    def run(command, out, *flags, tiny=None):
        tiny = tiny or {"train-ae": AE, "train-ldm": LDM}[command]
        flags = [str(f) for f in flags]
        return ldm.main([command, "--data", str(faces), "--data-root", root, "--out", str(out),
                         *tiny, *flags])
    return run

@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """A finished run folder with both stages. To be copied by those who change it."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    assert train("train-ae", out, "--steps", 4, "--log-every", 2) == 0
    assert train("train-ldm", out, "--steps", 4, "--log-every", 2) == 0
    return out

def made_up_vgg():
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
def vgg():
    return made_up_vgg()

@pytest.fixture(scope="module")
def lpips(vgg):
    return ldm.LPIPS(HERE / "lpips_weights.pth", vgg)

def waves(n, size, channels=3):
    """Two batches of images from formulas."""
    k = torch.arange(n * channels * size * size, dtype=torch.float64)
    k = k.view(n, channels, size, size)
    return (0.3 * k).sin().float(), (0.05 * k + 1).cos().float()

def shaken(net, scale=0.1):
    """The network with every weight random, also those that start at zero."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn_like(p))
    return net

class Fixed(nn.Module):
    """A network that answers the same to everything."""
    def __init__(self, answer):
        super().__init__()
        self.answer = answer
    def forward(self, *_):
        return self.answer

def assert_same(a, b, where=""):
    """Two nested checkpoints are equal bit for bit."""
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where

def load(path):
    return torch.load(path, weights_only=True)

def log_of(out, stage):
    return list(csv.DictReader((out / f"{stage}.csv").read_text().splitlines()))

def assert_refused(capsys, code, *words):
    """Exit code 2 and one sentence on stderr that holds these words."""
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("ldm.py: error: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err, err

# ---- The file -----------------------------------------------------------------------------------
def test_file_is_short_and_imports_only_what_the_readme_installs():
    """At most 1200 lines of 100 columns; the standard library, torch, torchvision, PIL, numpy."""
    text = (HERE / "ldm.py").read_text()
    assert len(text.splitlines()) <= 1200 and max(map(len, text.splitlines())) <= 100
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - sys.stdlib_module_names == {"torch", "torchvision", "PIL", "numpy"}

def test_section_banners_are_a_table_of_contents():
    """grep "^# ----" gives sections 1, 2, 3, ..., each with a title."""
    lines = (HERE / "ldm.py").read_text().splitlines()
    banners = [line for line in lines if line.startswith("# ----")]
    numbers = [int(re.match(r"# ---- (\d+)\. [A-Z]\S+.* -+$", b)[1]) for b in banners]
    assert numbers == list(range(1, len(banners) + 1)) and len(banners) > 9

def test_importing_prints_nothing_and_creates_nothing(tmp_path):
    """import ldm has no side effects and says nothing."""
    env = os.environ | {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", "import ldm"], env=env, cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())

# ---- 1. Settings --------------------------------------------------------------------------------
def test_settings_are_default_then_preset_then_given():
    """What the user gives wins over the data set's preset, which wins over the default."""
    assert ldm.resolve(ldm.AEConfig, {"data": "photos"}).size == 256
    assert ldm.resolve(ldm.AEConfig, {"data": "mnist"}).size == 28
    assert ldm.resolve(ldm.AEConfig, {"data": "mnist", "size": 32}).size == 32
    assert ldm.resolve(ldm.AEConfig, {"data": "/a/photos/"}).out == str(Path("runs", "photos"))

@pytest.mark.parametrize("cls", [ldm.AEConfig, ldm.LDMConfig])
@pytest.mark.parametrize("data", ["toyfaces", "mnist", "celebhq"])
def test_every_preset_is_valid(cls, data):
    """No preset is refused by the checks, and each names only data sets that exist."""
    cfg = ldm.resolve(cls, {"data": data})
    assert {d for f in fields(cls) for d in f.metadata["presets"]} <= {"toyfaces", "mnist"}
    assert cfg.data == data and cfg.out == str(Path("runs", data))

# ---- 2. Data ------------------------------------------------------------------------------------
def test_toyfaces_are_deterministic_by_index():
    """Face i is the same alone and among others; another size is the same face."""
    some = ldm.toyfaces([5, 900, 3])
    assert torch.equal(some[1], ldm.toyfaces([900])[0]) and torch.equal(some, some.clone())
    assert some.dtype == torch.uint8 and some.shape == (3, 3, 32, 32)
    big = F.avg_pool2d(ldm.toyfaces([5], 64).float(), 2)
    assert (big[0] - some[0].float()).abs().mean() < 3

def test_toyfaces_vary():
    """Hundred faces are all different, in all channels, with dark and bright parts."""
    x = ldm.toyfaces(range(100), 16).float()
    assert len(x.flatten(1).unique(dim=0)) == 100
    assert (x.std(0).mean((1, 2)) > 20).all() and x.min() < 30 and x.max() > 240

def test_to_float_spans_minus_one_to_one():
    """0 becomes -1 and 255 becomes 1."""
    x = ldm.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3), CPU)
    assert torch.allclose(x.flatten(), torch.tensor([-1, -0.6, 1]))

def rgba(size=16):
    """A picture (size, size, 4) whose colours and transparency vary."""
    y, x = np.mgrid[:size, :size] * 255 // (size - 1)
    return np.stack([x, y, 255 - x, (x + y) // 2], axis=2).astype(np.uint8)

def over_white(colour, alpha):
    a = alpha[..., None] / 255
    return colour * a + 255 * (1 - a)

def zoo():
    """(name, picture, save options, what the RGB pixels should be), all 16x16."""
    a, grey = rgba(), rgba()[..., 0]
    rgb, three = Image.fromarray(a[..., :3]), lambda g: np.repeat(g[..., None], 3, 2)
    cmyk = Image.merge("CMYK", Image.fromarray(a).split())
    palette = Image.fromarray((grey // 64).astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    table = np.array([[255] * 3, [200, 0, 0], [0, 200, 0], [0, 0, 200]])  # index 0: see-through
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(a[..., 3])])
    return [("one_bit.png", Image.fromarray(grey > 99), {}, three((grey > 99) * 255)),
            ("grey.png", Image.fromarray(grey), {}, three(grey)),
            ("colour.bmp", rgb, {}, a[..., :3]),
            ("lossless.webp", rgb, {"lossless": True}, a[..., :3]),
            ("animation.gif", Image.fromarray(grey // 64 * 64), {"save_all": True,
             "append_images": [Image.new("L", (16, 16))]}, three(grey // 64 * 64)),
            ("grey_alpha.png", la, {}, over_white(three(grey), a[..., 3])),
            ("palette.png", palette, {"transparency": 0}, table[grey // 64]),
            ("rgba.png", Image.fromarray(a), {}, over_white(a[..., :3], a[..., 3])),
            ("cmyk.tif", cmyk, {}, np.asarray(cmyk.convert("RGB"))),
            ("16.png", Image.fromarray(grey.astype(np.uint16) * 256 + 200), {}, three(grey))]

@pytest.mark.parametrize("name, image, options, expected", zoo(), ids=[z[0] for z in zoo()])
def test_every_kind_of_picture_is_decoded(tmp_path, name, image, options, expected):
    """Palettes, transparency over white, 1, 8 and 16 bits, CMYK: right pixels, also in grey."""
    image.save(tmp_path / name, **options)
    got = ldm.decode_image(tmp_path / name, 16, 3)
    assert got.dtype == np.uint8 and got.shape == (16, 16, 3)
    assert np.abs(got - expected.astype(float)).max() <= 1  # rounding of alpha
    grey = expected @ [0.299, 0.587, 0.114]
    assert np.abs(ldm.decode_image(tmp_path / name, 16, 1)[..., 0] - grey).max() <= 1.5

@pytest.mark.parametrize("orientation, turn", [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_photos_held_sideways_come_out_upright(tmp_path, orientation, turn):
    """The EXIF orientation of a JPEG is obeyed."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgba()[..., :3]).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as img:
        stored = np.asarray(img)
    got = ldm.decode_image(tmp_path / "a.jpg", 16, 3)
    assert np.array_equal(got, np.rot90(stored, turn))

@pytest.mark.parametrize("w, h", [(1, 1), (5, 300), (300, 5), (48, 32), (1, 5000)])
def test_odd_sizes_give_the_centre_square(tmp_path, w, h):
    """Whatever the size, only the centre square is seen, nothing is squeezed."""
    pixels = np.full((h, w, 3), (0, 0, 255), np.uint8)
    half = min(w, h) / 2 + 5
    y, x = np.mgrid[:h, :w] + 0.5
    pixels[(abs(y - h / 2) <= half) & (abs(x - w / 2) <= half)] = (250, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = ldm.decode_image(tmp_path / "a.png", min(w, h), 3)
    assert (got == np.array([250, 0, 0])).all()

def test_big_jpeg_is_shrunk_close_to_what_pil_makes_of_it(tmp_path):
    """The fast JPEG decoding at a lower resolution does not change the picture."""
    face = ldm.toyfaces([1], 256)[0].permute(1, 2, 0).numpy()
    Image.fromarray(face).save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(Image.fromarray(face).resize((32, 32), Image.Resampling.LANCZOS))
    got = ldm.decode_image(tmp_path / "a.jpg", 32, 3)
    assert np.abs(got - expected.astype(float)).mean() < 3

def test_folder_is_searched_and_broken_files_are_named_and_skipped(tmp_path, faces, capsys):
    """Images of subfolders count; a broken picture costs a line, not the run."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.PNG", "deep/b.png", "deep/c.png")):
        shutil.copy(faces / f"{i:02}.png", tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes((faces / "00.png").read_bytes()[:60])
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    images = ldm.load_folder(tmp_path / "in", 16, 3, tmp_path / "cache")
    out = capsys.readouterr().out
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert "broken.png" in out and "1 unreadable" in out
    alone = [ldm.decode_image(faces / f"{i:02}.png", 16, 3) for i in range(3)]
    assert {x.permute(1, 2, 0).numpy().tobytes() for x in images} == {x.tobytes() for x in alone}

def test_folder_without_readable_images_is_refused(tmp_path):
    """Missing, empty and all broken folders are a mistake of the user; no cache is left."""
    for name, content in (("missing", None), ("empty", ()), ("text", ["a.txt"]),
                          ("bad", ["a.png", "b.jpg"])):
        if content is not None:
            (tmp_path / name).mkdir()
            for file in content:
                (tmp_path / name / file).write_bytes(b"not a picture")
        with pytest.raises(ldm.UserError, match=f"--data .*{name}"):
            ldm.load_folder(tmp_path / name, 16, 3, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))

def test_folder_is_decoded_once_until_it_changes(tmp_path, faces, monkeypatch):
    """The second call reads the cache; another size or one more file means a new cache."""
    shutil.copytree(faces, tmp_path / "in")
    load = lambda size=16: ldm.load_folder(tmp_path / "in", size, 3, tmp_path / "cache")
    first, calls, decode = load(), [], ldm.decode_image
    def counted(*args):
        calls.append(args)
        return decode(*args)
    monkeypatch.setattr(ldm, "decode_image", counted)
    assert torch.equal(load(), first) and not calls
    assert load(8).shape[-1] == 8 and len(calls) == 40
    shutil.copy(faces / "00.png", tmp_path / "in" / "new.png")
    assert len(load()) == 41

def test_folder_order_is_always_the_same_and_shuffled(tmp_path, faces):
    """Held-out images are a fixed, mixed tenth, not the last files of the folder."""
    a = ldm.load_folder(faces, 8, 3, tmp_path / "a")
    assert torch.equal(a, ldm.load_folder(faces, 8, 3, tmp_path / "b"))
    in_order = [torch.from_numpy(ldm.decode_image(p, 8, 3)) for p in sorted(faces.iterdir())]
    assert not torch.equal(a, torch.stack(in_order).permute(0, 3, 1, 2))
    train_images, held = ldm.load_images(str(faces), tmp_path, 8, 3)
    assert torch.equal(torch.cat([train_images, held]), a) and len(held) == 4

@pytest.mark.parametrize("layout", [
    "celebhq", "CelebAMask-HQ/CelebA-HQ-img", "celeba_hq_256", "data256x256",
    "celebahq-resized-256x256", "celeba_hq"])
def test_celebhq_is_found_where_its_archives_unpack_to(tmp_path, faces, layout):
    """--data celebhq knows the folder names of the usual downloads."""
    (tmp_path / layout).mkdir(parents=True)
    for i in range(11):
        shutil.copy(faces / f"{i:02}.png", tmp_path / layout)
    assert [len(x) for x in ldm.load_images("celebhq", tmp_path, 8, 3)] == [9, 2]

def test_missing_celebhq_and_mnist_say_where_to_put_them(tmp_path, monkeypatch):
    """Without the data the message names the folder in which they are looked for."""
    with pytest.raises(ldm.UserError, match=f"{re.escape(str(tmp_path))}.*CelebA-HQ"):
        ldm.load_images("celebhq", tmp_path, 8, 3)
    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")
    monkeypatch.setattr(ldm.datasets, "MNIST", offline)
    with pytest.raises(ldm.UserError, match=re.escape(str(tmp_path / "MNIST" / "raw"))):
        ldm.load_images("mnist", tmp_path, 28, 1)

@pytest.mark.parametrize("size, channels", [(28, 1), (32, 1), (16, 3)])
def test_mnist_obeys_size_and_channels(tmp_path, monkeypatch, size, channels):
    """The digits come in any size, grey or as three equal channels, and split as published."""
    class Digits:
        def __init__(self, root, train, download):
            self.data = torch.full((7 if train else 3, 28, 28), 200, dtype=torch.uint8)
    monkeypatch.setattr(ldm.datasets, "MNIST", Digits)
    for x, n in zip(ldm.load_images("mnist", tmp_path, size, channels), (7, 3)):
        assert x.shape == (n, channels, size, size) and x.dtype == torch.uint8 and (x == 200).all()

@pytest.mark.parametrize("n, batch", [(10, 5), (10, 3), (3, 8)])
def test_batches_cover_each_epoch_once(n, batch):
    """Cut into pieces of n, the stream of indices is a row of shuffles."""
    stream = ldm.batch_indices(n, batch, seed=1)
    drawn = torch.cat([next(stream) for _ in range(6 * n)])
    epochs = drawn[:len(drawn) // n * n].view(-1, n)
    assert (epochs.sort(dim=1).values == torch.arange(n)).all()
    assert len(epochs.unique(dim=0)) > 1

def test_skipping_batches_continues_the_same_stream():
    """A resumed run sees the batches that it would have seen."""
    whole, rest = ldm.batch_indices(10, 4, 3), ldm.batch_indices(10, 4, 3, skip=7)
    for _ in range(7):
        next(whole)
    assert all(torch.equal(next(whole), next(rest)) for _ in range(9))
    assert not torch.equal(next(ldm.batch_indices(10, 4, 3)), next(ldm.batch_indices(10, 4, 4)))

# ---- 3. Blocks ----------------------------------------------------------------------------------
@pytest.mark.parametrize("t_dim", [None, 12])
@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_block_switches_change_only_what_they_name(t_dim, heads, resample, layers):
    """Time, attention and resampling are each on or off, in a down block and in an up block."""
    x, t_emb = torch.randn(2, 8, 8, 8), None if t_dim is None else torch.randn(2, t_dim)
    down = ldm.DownBlock(8, 16, layers, t_dim, heads, down=resample)
    up = ldm.UpBlock(8, 16, layers, t_dim, heads, up=resample, c_skip=4)
    assert down(x, t_emb).shape == ((2, 16, 4, 4) if resample else (2, 16, 8, 8))
    side = 16 if resample else 8
    assert up(x, t_emb, torch.randn(2, 4, side, side)).shape == (2, 16, side, side)
    for block in (down, up):
        attentions = [m for m in block.modules() if isinstance(m, ldm.Attention)]
        assert len(attentions) == (layers if heads else 0)
        if t_dim:
            shaken(block)
            args = () if block is down else (torch.randn(2, 4, side, side),)
            assert not torch.allclose(block(x, t_emb, *args), block(x, -t_emb, *args))

@pytest.mark.parametrize("t_dim, heads, layers", [(None, 0, 1), (12, 0, 2), (12, 4, 1)])
def test_mid_block_keeps_the_resolution(t_dim, heads, layers):
    """A mid block has one ResBlock more than attention layers."""
    block = ldm.MidBlock(8, 16, layers, t_dim, heads)
    t_emb = torch.randn(2, t_dim) if t_dim else None
    assert block(torch.randn(2, 8, 5, 3), t_emb).shape == (2, 16, 5, 3)
    assert sum(isinstance(m, ldm.ResBlock) for m in block.modules()) == layers + 1
    assert sum(isinstance(m, ldm.Attention) for m in block.modules()) == (layers if heads else 0)

def test_up_block_works_without_a_skip_and_listens_to_it():
    """The decoder has no skips; where there is one, the output depends on it."""
    x, skip = torch.randn(1, 8, 4, 4), torch.randn(1, 4, 8, 8)
    assert ldm.UpBlock(8, 8, 1)(x).shape == (1, 8, 8, 8)
    block = shaken(ldm.UpBlock(8, 8, 1, c_skip=4))
    assert not torch.allclose(block(x, None, skip), block(x, None, -skip))

def test_group_norm_for_the_compiler_is_group_norm(monkeypatch):
    """The formulas that torch.compile sees give nn.GroupNorm's values and gradients."""
    norm, results = ldm.GroupNorm(64), []
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        x = (3 + 2 * torch.randn(2, 64, 6, 10, generator=torch.manual_seed(1))).requires_grad_()
        norm.zero_grad()
        y = norm(x)
        (y * torch.randn(y.shape, generator=torch.manual_seed(2))).sum().backward()
        results.append((y, x.grad, norm.weight.grad.clone(), norm.bias.grad.clone()))
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("c", [4, 8, 12, 16, 24, 48, 64, 128, 192, 512])
def test_no_channel_is_normalised_alone(c):
    """A group of one channel would take its mean away; there are at most 32 groups."""
    groups = ldm.GroupNorm(c).num_groups
    assert c % groups == 0 and c // groups >= 4 and groups <= 32

def test_up_block_shows_its_convolution_each_value_twice():
    """Nearest neighbour: (B, c, h, w) -> (B, c, 2h, 2w)."""
    block, x = ldm.UpBlock(4, 8, 1), torch.randn(2, 4, 3, 5)
    seen = []
    block.up.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert block(x).shape == (2, 8, 6, 10)
    assert torch.equal(seen[0], F.interpolate(x, scale_factor=2, mode="nearest"))

def test_attention_equals_softmax_written_out():
    """The fused attention is softmax(q k / sqrt(d)) v per head, plus the input."""
    layer, x = shaken(ldm.Attention(8, heads=2)), torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=2)   # (B, 15, 8)
    out = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / 4 ** 0.5
        out.append(scores.softmax(2) @ v[..., head])
    expected = x + layer.proj(torch.cat(out, 2)).transpose(1, 2).view_as(x)
    assert torch.allclose(layer(x), expected, atol=1e-5)

def test_time_embedding_tells_all_steps_apart():
    """No two of the 1000 steps have the same sinusoids."""
    emb = ldm.TimeEmbedding(32, 32)
    emb.mlp = nn.Identity()
    codes = emb(torch.arange(1000))
    assert codes.shape == (1000, 32)
    distances = torch.cdist(codes, codes) + 9 * torch.eye(1000)
    assert distances.min() > 0.1

# ---- 4. Autoencoders ----------------------------------------------------------------------------
@pytest.mark.parametrize("build", [partial(ldm.VQVAE, codebook_size=64), ldm.VAE])
@pytest.mark.parametrize("channels, widths, size", [(1, (8, 8), 28), (3, (8, 16, 16), 16)])
def test_autoencoder_shapes(build, channels, widths, size):
    """One halving for each neighbouring pair of widths; decoding returns the image size."""
    ae, x = build(channels, widths, layers=1, z_channels=5), torch.randn(2, channels, size, size)
    z, side = ae.encode(x), size // 2 ** (len(widths) - 1)
    assert z.shape == (2, 5, side, side) and ae.decode(z).shape == x.shape
    x_rec, terms = ae(x)
    assert x_rec.shape == x.shape and all(t.dim() == 0 and t.isfinite() for t in terms.values())

@pytest.fixture
def vq():
    return ldm.VQVAE(1, (8, 8), layers=1, z_channels=4, codebook_size=64)

@pytest.mark.parametrize("bf16", [False, True])
def test_quantiser_finds_the_nearest_code(vq, bf16):
    """As a brute-force search in float64, also under bf16 autocast, which would get many wrong."""
    z_e = torch.randn(4, 4, 12, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        z_q, indices = vq.quantise(z_e)
    vectors = z_e.double().movedim(1, -1).reshape(-1, 1, 4)
    nearest = (vectors - vq.codebook.double()).square().sum(-1).argmin(1)
    assert torch.equal(indices.flatten(), nearest)
    assert torch.equal(z_q.movedim(1, -1).reshape(-1, 4), vq.codebook[nearest])

def test_gradient_goes_straight_through_the_quantiser(vq):
    """z_e gets the gradient that the decoder sends to z_q, unchanged."""
    z_e = torch.randn(2, 4, 3, 3, requires_grad=True)
    vq.encode = lambda x: z_e
    vq(torch.zeros(2, 1, 6, 6))[0].square().sum().backward()
    z_q = vq.quantise(z_e)[0].detach().requires_grad_()
    vq.decoder(z_q).square().sum().backward()
    assert torch.allclose(z_e.grad, z_q.grad, rtol=1e-3, atol=1e-5) and z_e.grad.abs().max() > 0

def test_decoder_sees_codes_in_training_and_in_decode(vq):
    """forward and decode both quantise, so small errors of stage 2 vanish."""
    x = torch.randn(2, 1, 8, 8)
    z = vq.encode(x)
    z_q, indices = vq.quantise(z)
    assert torch.allclose(vq(x)[0], vq.decoder(z_q), atol=1e-5)
    assert torch.equal(vq.decode(z), vq.decoder(z_q))
    assert torch.equal(vq.decode(z_q + 1e-4), vq.decode(z_q)) and not torch.allclose(z, z_q)

@pytest.mark.parametrize("term, moved, still", [("codebook", "codebook", "encoder"),
                                                ("commit", "encoder", "codebook")])
def test_codebook_loss_moves_codes_and_commitment_loss_the_encoder(vq, term, moved, still):
    """Each stop-gradient is on the right side, Eq. 3; the value is the mean squared distance."""
    x = torch.randn(2, 1, 8, 8)
    loss = shaken(vq)(x)[1][term]
    z_e = vq.encode(x)
    assert torch.allclose(loss, (z_e - vq.quantise(z_e)[0]).square().mean())
    loss.backward()
    grads = {name: p.grad for name, p in vq.named_parameters()}
    assert all(g is None for name, g in grads.items() if name.startswith((still, "decoder")))
    assert all(g.abs().max() > 0 for name, g in grads.items()
               if name.startswith(moved) and name.endswith("weight") or name == moved)

def test_first_restart_puts_the_codes_on_the_data(vq):
    """However far the encoder's outputs are from N(0, 1), the codes start among them, spread."""
    z_e = 50 + 3 * torch.randn(2, 4, 16, 16)
    vq.restart_codes(z_e)
    distance = torch.cdist(vq.codebook.detach(), z_e.movedim(1, -1).reshape(-1, 4)).min(1).values
    assert distance.max() < 0.5 and len(vq.codebook.unique(dim=0)) == 64
    assert ldm.codebook_use(torch.bincount(vq.quantise(z_e)[1].flatten(), minlength=64))[0] > 90

def test_restart_moves_dead_codes_only(vq):
    """Used codes stay where they are, and counting starts again."""
    x = torch.randn(2, 1, 8, 8)
    vq.train()(x)
    used, before = vq.usage > 0, vq.codebook.detach().clone()
    assert 0 < used.sum() < 64 and vq.usage.sum() == 2 * 4 * 4
    vq.restart_codes(torch.randn(2, 4, 4, 4))
    assert torch.equal(vq.codebook[used], before[used])
    assert (vq.codebook[~used] != before[~used]).any(1).all() and vq.usage.sum() == 0
    vq.eval()(x)
    assert vq.usage.sum() == 0

def test_codebook_use_of_known_counts():
    """All codes equally: 100 % and K. One code: 1 / K and 1. Nothing picked yet: 0 and 1."""
    for picks, percent, perplexity in (([5, 5, 5, 5], 100, 4), ([9, 0, 0, 0], 25, 1),
                                       ([6, 2, 0, 0], 50, 4 / 3 ** 0.75), ([0, 0, 0, 0], 0, 1)):
        got = [float(v) for v in ldm.codebook_use(torch.tensor(picks).float())]
        assert got == pytest.approx([percent, perplexity])

@pytest.fixture
def vae():
    """A VAE without networks: x_rec is z, and the encoder's answer is set by the test."""
    vae = ldm.VAE(1, (8, 8), 1, 2)
    vae.decoder = nn.Identity()
    return vae

def test_kl_equals_that_of_torch_distributions(vae):
    """The KL divergence to N(0, 1), summed and divided by the number of image values."""
    mean, logvar, x = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.zeros(3, 1, 8, 8)
    vae.encoder = Fixed(torch.cat([mean, logvar], 1))
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum() / x.numel()
    assert torch.allclose(vae(x)[1]["kl"], kl, rtol=1e-5)
    assert torch.equal(vae.encode(x), mean)

def test_vae_sample_is_reparameterised(vae):
    """z has the encoder's mean and deviation, and both get a gradient through it."""
    mean = torch.full((4, 2, 32, 32), 0.5, requires_grad=True)
    logvar = torch.full((4, 2, 32, 32), math.log(0.04), requires_grad=True)
    vae.encoder = Fixed(torch.cat([mean, logvar], 1))
    z = vae(torch.zeros(4, 1, 64, 64))[0]
    assert z.mean().item() == pytest.approx(0.5, abs=0.01)
    assert z.std().item() == pytest.approx(0.2, abs=0.01)
    z.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))
    assert torch.allclose(logvar.grad, (z - mean) / 2, atol=1e-6)  # dz / dlogvar

def test_vae_starts_with_little_noise():
    """The deviation of a new VAE's latents is a fraction of 1, or it would learn to shout first."""
    mean, logvar = ldm.VAE(1, (8, 8), 1, 2).encoder(torch.randn(4, 1, 32, 32)).chunk(2, dim=1)
    assert (0.5 * logvar).exp().max() < 0.2 and logvar.isfinite().all()

@pytest.mark.parametrize("logvar", [-1e4, 1e4])
def test_kl_stays_finite_for_extreme_variances(vae, logvar):
    """The clamp keeps exp(logvar) in range."""
    vae.encoder = Fixed(torch.full((1, 4, 4, 4), logvar))
    x_rec, terms = vae(torch.zeros(1, 1, 8, 8))
    assert x_rec.isfinite().all() and terms["kl"].isfinite()

# ---- 5. LPIPS -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size, full, half", [  # `lpips` 0.1.4, net="vgg", these made-up weights
    (16, (0.1871566, 0.1784239), (0.0124521, 0.0127265)),
    (28, (0.1876252, 0.1908308), (0.0185277, 0.0183998)),
    (64, (0.2209063, 0.2215153), (0.0077685, 0.0077767))])
def test_lpips_equals_the_lpips_package(lpips, size, full, half):
    """Distances recorded from the package, of two waves and of a wave to its paler copy."""
    x, y = waves(2, size)
    assert lpips(x, y).tolist() == pytest.approx(full, abs=1e-4)
    assert lpips(0.5 * x, x).tolist() == pytest.approx(half, abs=1e-5)

@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_lpips_of_equal_flat_images_is_zero_with_finite_gradient(lpips, value):
    """The usual formula gives NaN here: a square root at zero."""
    x = torch.full((1, 3, 16, 16), value, requires_grad=True)
    distance = lpips(x, x.detach())
    distance.sum().backward()
    assert distance.item() == 0 and x.grad.isfinite().all()

def test_lpips_gradient_is_finite_where_all_features_are_zero(vgg):
    """At a zero vector the square root in its length must not divide by zero; and very negative
    biases, which silence every feature, give distance 0."""
    f = torch.zeros(1, 4, 2, 2, requires_grad=True)
    ldm.LPIPS.unit(f).sum().backward()
    assert f.grad.isfinite().all()
    dead = {k: v - 1e3 * (v.dim() == 1) for k, v in vgg.items()}
    x = waves(1, 16)[0].requires_grad_()
    distance = ldm.LPIPS(HERE / "lpips_weights.pth", dead)(x, -x.detach())
    distance.sum().backward()
    assert distance.item() == 0 and x.grad.isfinite().all()

def test_lpips_trains_x_alone(lpips):
    """The gradient reaches x, not y and not the frozen network."""
    x, y = (v.requires_grad_() for v in waves(1, 16))
    lpips(x, y).sum().backward()
    assert x.grad.abs().max() > 0 and y.grad is None
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training

def test_lpips_takes_grey_and_small_images(lpips):
    """Grey is three equal channels; below 16 pixels the image is enlarged; one per image."""
    x, y = waves(3, 16, channels=1)
    rgb = lpips(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1))
    assert torch.allclose(lpips(x, y), rgb, atol=1e-6) and rgb.shape == (3,)
    x, y = waves(1, 8)
    big = [F.interpolate(v, scale_factor=2, mode="bilinear") for v in (x, y)]
    assert torch.allclose(lpips(x, y), lpips(*big), atol=1e-6)

def test_lpips_normalises_in_float32():
    """Squares of large half-precision features would overflow."""
    unit = ldm.LPIPS.unit(torch.full((1, 512, 1, 1), 300.0, dtype=torch.float16))
    assert unit.dtype == torch.float32 and torch.allclose(unit.square().sum(), torch.ones(()))

def test_missing_vgg_weights_are_explained(monkeypatch, tmp_path, capsys):
    """Offline without a cache: the message names the file to bring and the flag to leave."""
    def offline(*args, **kwargs):
        raise URLError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ldm.UserError, match="vgg16.*pth.*--perceptual-weight 0"):
        ldm.LPIPS(HERE / "lpips_weights.pth")
    code = ldm.main(["train-ae", *AE, "--perceptual-weight", "1"])
    assert_refused(capsys, code, "--perceptual-weight 0", "no network")
    assert not list(tmp_path.iterdir())

# ---- 6. PatchGAN --------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [8, 9, 15, 28, 33, 65])
@pytest.mark.parametrize("channels", [1, 3])
def test_discriminator_scores_patches_of_any_size(size, channels):
    """A map of scores, also for odd and for tiny images."""
    scores, side = ldm.PatchGAN(channels, 8)(torch.randn(2, channels, size, size)), size // 8 + 1
    assert scores.shape == (2, 1, side, side)

def test_gan_losses_equal_their_formulas():
    """Each kind against the papers' formulas, written out."""
    real, fake = torch.tensor([0.5, -2.0]), torch.tensor([0.25, 3.0])
    log_sigmoid = lambda s: -math.log(1 + math.exp(-s))
    g = {"bce": -(log_sigmoid(0.25) + log_sigmoid(3.0)) / 2,
         "lsgan": (0.75 ** 2 + 2.0 ** 2) / 2, "hinge": -(0.25 + 3.0) / 2}
    d = {"bce": -(log_sigmoid(0.5) + log_sigmoid(-2) + log_sigmoid(-0.25) + log_sigmoid(-3)) / 4,
         "lsgan": (0.5 ** 2 + 3.0 ** 2 + 0.25 ** 2 + 3.0 ** 2) / 4,
         "hinge": (0.5 + 3.0 + 1.25 + 4.0) / 4}
    for kind in ("bce", "lsgan", "hinge"):
        assert float(ldm.generator_loss(kind, fake)) == pytest.approx(g[kind], rel=1e-5)
        assert float(ldm.discriminator_loss(kind, real, fake)) == pytest.approx(d[kind], rel=1e-5)

@pytest.mark.parametrize("kind", ["bce", "lsgan", "hinge"])
def test_gan_gradients_point_the_right_way(kind):
    """The autoencoder raises the score of its images; the discriminator lowers it."""
    real, fake = (torch.full((3,), 0.5, requires_grad=True) for _ in range(2))
    assert (torch.autograd.grad(ldm.generator_loss(kind, fake), fake)[0] < 0).all()
    to_real, to_fake = torch.autograd.grad(ldm.discriminator_loss(kind, real, fake), (real, fake))
    assert (to_real < 0).all() and (to_fake > 0).all()

@pytest.fixture
def discriminators(monkeypatch):
    """A list that gets each discriminator that a training makes."""
    made = []
    class Spied(ldm.PatchGAN):
        def __init__(self, channels):
            super().__init__(channels, width=8)
            made.append(self)
    monkeypatch.setattr(ldm, "PatchGAN", Spied)
    return made

GAN = "--gan-weight 1 --disc-start 0 --log-every 1".split()

@pytest.mark.parametrize("kind", ["bce", "lsgan", "hinge"])
def test_generator_step_leaves_no_gradient_in_discriminator(train, tmp_path, monkeypatch, kind,
                                                            discriminators):
    """When its own loss is computed, the discriminator holds no gradient; it is trainable."""
    seen, loss = [], ldm.discriminator_loss
    def spied(*args):
        seen.append([(p.grad is None, p.requires_grad) for p in discriminators[0].parameters()])
        return loss(*args)
    monkeypatch.setattr(ldm, "discriminator_loss", spied)
    assert train("train-ae", tmp_path / "out", *GAN, "--gan", kind, "--steps", 3) == 0
    assert len(seen) == 3 and all(pair == (True, True) for step in seen for pair in step)

def test_discriminator_reaches_its_optimum(train, tmp_path, monkeypatch, discriminators):
    """Against a frozen autoencoder, D(real) nears 1 and D(fake) 0; it would be 2/3 or more if the
    generator's gradient stayed in the discriminator."""
    optimise = ldm.optimise
    def only_discriminator(scaler, optimiser, net):
        if net is discriminators[0]:
            optimise(scaler, optimiser, net)
        else:
            optimiser.zero_grad()
    monkeypatch.setattr(ldm, "optimise", only_discriminator)
    assert train("train-ae", tmp_path / "out", *GAN, "--gan", "lsgan", "--gan-weight", 20,
                 "--steps", 150, "--batch", 8, "--log-every", 10) == 0
    last = log_of(tmp_path / "out", "ae")[-1]
    assert abs(float(last["score_fake"])) < 0.2 and float(last["score_real"]) > 0.8, last

def test_autoencoder_learns_from_the_discriminator_alone(train, tmp_path):
    """With every other weight at 0: nothing moves before --disc-start, then the discriminator
    alone, for the weight rises from 0, then the decoder too."""
    flags = "--ae kl --gan-weight 1 --recon-weight 0 --kl-weight 0 --disc-start 2".split()
    parts = {}
    for steps in (1, 3, 5):
        out, given = tmp_path / str(steps), flags if steps > 2 else flags[:-2]
        assert train("train-ae", out, *given, "--steps", steps) == 0
        parts[steps] = load(out / "ae.pt")["parts"]
    assert parts[3]["opt_d"]["state"][0]["step"] == 1  # at step 2 and not at 0 and 1
    assert not torch.equal(parts[3]["disc"]["net.0.weight"], parts[1]["disc"]["net.0.weight"])
    assert_same(parts[1]["ae"], parts[3]["ae"])
    some = "decoder.0.weight"
    assert not torch.equal(parts[5]["ae"][some], parts[1]["ae"][some])

# ---- 7. Noise scheduler -------------------------------------------------------------------------
def scheduler_of(target="eps", schedule="linear", T=1000):
    return ldm.NoiseScheduler(T, schedule, target)

def test_linear_schedule_has_the_right_ends():
    """beta runs from 0.0015 to 0.0195, evenly in its square root."""
    abar = torch.tensor([1.0] + scheduler_of().abar[:-1], dtype=torch.float64)
    beta = 1 - abar[1:] / abar[:-1]
    assert float(beta[0]) == pytest.approx(0.0015) and float(beta[-1]) == pytest.approx(0.0195)
    assert torch.allclose(beta.sqrt().diff(), beta.sqrt().diff().mean())
    assert float(abar[-1]) ** 0.5 < 0.02  # almost no image left

def test_cosine_schedule_follows_its_formula():
    """abar is the squared cosine, but for the last betas, which are limited."""
    abar = torch.tensor(scheduler_of(schedule="cosine").abar[:-1], dtype=torch.float64)
    s = torch.arange(1, 1001, dtype=torch.float64) / 1000
    f = lambda s: torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(abar[:-1], (f(s) / f(torch.zeros(())))[:-1], rtol=1e-6)
    assert 0 < abar[-1] < 1e-4

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("T", [20, 1000, 4000])
def test_schedule_is_the_same_curve_for_every_T(schedule, T):
    """Decreasing from almost 1 to almost 0, ended by the clean -1; T changes the grid alone."""
    s, reference = scheduler_of(schedule=schedule, T=T), scheduler_of(schedule=schedule)
    assert len(s.abar) == T + 1 and s.abar[-1] == 1
    assert all(1 > a > b > 0 for a, b in zip(s.abar, s.abar[1:-1]))
    assert s.abar[T // 2 - 1] == pytest.approx(reference.abar[499], abs=0.03)

def test_add_noise_in_one_go_equals_adding_it_step_by_step():
    """The scale and the variance after t + 1 single steps, Eq. 2, are those of Eq. 4."""
    s, t = scheduler_of(T=50), torch.arange(50)
    one, none = torch.ones(50, 1, 1, 1), torch.zeros(50, 1, 1, 1)
    scale, sigma = s.add_noise(one, none, t)[0].flatten(), s.add_noise(none, one, t)[0].flatten()
    mean, var = 1.0, 0.0
    for i in range(50):
        beta = (0.0015 ** 0.5 + (0.0195 ** 0.5 - 0.0015 ** 0.5) * i / 49) ** 2 * 1000 / 50
        mean, var = mean * (1 - beta) ** 0.5, var * (1 - beta) + beta
        assert float(scale[i]) == pytest.approx(mean, rel=1e-4)
        assert float(sigma[i]) == pytest.approx(var ** 0.5, rel=1e-4)

@pytest.mark.parametrize("target", ["eps", "v"])
def test_prediction_target_inverts_to_z0_and_eps(target):
    """z0_and_eps takes back what add_noise did, at each step, without a clamp."""
    s, (z0, eps) = scheduler_of(target), torch.randn(2, 1, 4, 8, 8)
    z0 = 3 * z0
    for t in (0, 1, 500, 998, 999):
        z_t, answer = s.add_noise(z0, eps, torch.tensor([t]))
        got_z0, got_eps = s.z0_and_eps(answer, z_t, t)
        assert torch.allclose(got_z0, z0, atol=1e-3) and torch.allclose(got_eps, eps, atol=1e-4)
    alpha, sigma = s.abar[999] ** 0.5, (1 - s.abar[999]) ** 0.5
    assert torch.allclose(answer, eps if target == "eps" else alpha * eps - sigma * z0, atol=1e-5)

def test_add_noise_takes_a_step_per_image():
    """A batch with mixed t equals the images one by one."""
    s, z0, eps, t = scheduler_of("v"), *torch.randn(2, 3, 2, 4, 4), torch.tensor([0, 400, 999])
    for k, whole in enumerate(s.add_noise(z0, eps, t)):
        alone = [s.add_noise(z0[i:i + 1], eps[i:i + 1], t[i:i + 1])[k] for i in range(3)]
        assert torch.allclose(whole, torch.cat(alone))

@pytest.mark.parametrize("steps", [1, 2, 7, 20, 1000])
def test_timesteps_run_from_the_noisiest_to_clean(steps):
    """Pairs in a chain from T-1 to -1, strictly falling, evenly spaced."""
    pairs = scheduler_of().timesteps(steps)
    assert len(pairs) == steps and pairs[0][0] == 999 and pairs[-1][1] == -1
    assert all(a[1] == b[0] for a, b in zip(pairs, pairs[1:]))
    gaps = [t - t_prev for t, t_prev in pairs]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1

class Free:
    """A latent space whose images are the latents, without a clamp."""
    mean = torch.zeros(1)
    def decode(self, z):
        return z

PIXELS = ldm.LatentSpace(None, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))

def best_model(s, mean, std):
    """The UNet that knows that each value of the data is N(mean, std^2), and nothing else."""
    def predict(z_t, t):
        abar = s.abar[int(t[0])]
        alpha, var = abar ** 0.5, 1 - abar
        away = (z_t - alpha * mean) / (alpha ** 2 * std ** 2 + var)
        z0, eps = mean + alpha * std ** 2 * away, var ** 0.5 * away
        return eps if s.target == "eps" else alpha * eps - var ** 0.5 * z0
    return predict

@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_samplers_return_exactly_z0_from_the_true_noise(sampler, target, steps):
    """A perfect prediction leaves no noise behind, for any number of steps."""
    s, z0 = scheduler_of(target), torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)
    images = ldm.sample_images(best_model(s, z0, 0.0), s, PIXELS, (1, 4, 4), 2, 0, sampler, steps)
    assert torch.allclose(images, z0.expand(2, -1, -1, -1), atol=1e-4)

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("std", [0.7, 2.0])
@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddim", 200), ("dpm", 60)])
def test_samplers_reproduce_mean_and_deviation_of_gaussian_data(sampler, steps, std, schedule):
    """Data N(0.3, std^2), whose best prediction is known: so are the samples. Finitely many steps
    lose up to 3 % of the deviation, 16384 values tell the mean to 0.03."""
    s = scheduler_of("v", schedule)
    x = ldm.sample_images(best_model(s, 0.3, std), s, Free(), (1, 32, 32), 16, 0, sampler, steps)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.05)
    assert float(x.std()) == pytest.approx(std, rel=0.03)

def test_dpm_is_closer_to_the_exact_solution_than_ddim():
    """For Gaussian data the ODE's solution is known; second order beats first order."""
    s, mean, std = scheduler_of(), 0.1, 2.0
    z_T = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(7 * 1_000_003))
    alpha, var = s.abar[999] ** 0.5, 1 - s.abar[999]
    exact = mean + std * (z_T - alpha * mean) / (alpha ** 2 * std ** 2 + var) ** 0.5
    model, error = best_model(s, mean, std), {}
    for sampler in ("ddim", "dpm"):
        x = ldm.sample_images(model, s, Free(), (1, 16, 16), 1, 7, sampler, 15)[0]
        error[sampler] = float((x - exact).abs().mean())
    assert error["dpm"] < error["ddim"] / 3, error

@pytest.mark.parametrize("t, t_prev", [(999, 998), (500, 499), (1, 0), (999, 900), (400, 20)])
def test_ddpm_step_draws_from_the_textbook_posterior(t, t_prev):
    """Mean and variance of q(z_prev | z_t, z0) by Bayes' rule; for neighbours this is Eq. 7."""
    s, (z0, z_t, noise) = scheduler_of(), torch.randn(3, 1, 1, 4, 4).double()
    alpha = s.abar[t] / s.abar[t_prev]
    precision = alpha / (1 - alpha) + 1 / (1 - s.abar[t_prev])  # of likelihood and prior
    mean = (alpha ** 0.5 / (1 - alpha) * z_t
            + s.abar[t_prev] ** 0.5 / (1 - s.abar[t_prev]) * z0) / precision
    got_mean = s.ddpm_step(z0, z_t, t, t_prev, torch.zeros_like(noise))
    assert torch.allclose(got_mean, mean)
    got = s.ddpm_step(z0, z_t, t, t_prev, noise) - got_mean
    assert torch.allclose(got, noise * precision ** -0.5)

def test_last_ddpm_step_adds_no_noise():
    """From t = 0 to clean the answer is z0 itself."""
    s, (z0, z_t, noise) = scheduler_of(), torch.randn(3, 1, 1, 4, 4)
    assert torch.allclose(s.ddpm_step(z0, z_t, 0, -1, 1e6 * noise), z0)
    assert torch.allclose(s.ddpm_step(z0, z_t, 400, -1, 1e6 * noise), z0)

@pytest.mark.parametrize("last_t", [None, 950])
def test_dpm_step_equals_the_published_formula(last_t):
    """DPM-Solver++(2M) in the paper's letters: lambda, h, r, D."""
    s, (z0, z_t, z0_last) = scheduler_of(), torch.randn(3, 1, 1, 4, 4).double()
    alpha, sigma = (lambda t: s.abar[t] ** 0.5), (lambda t: (1 - s.abar[t]) ** 0.5)
    lam = lambda t: math.log(alpha(t) / sigma(t))
    h, D = lam(800) - lam(900), z0
    if last_t:
        r = (lam(900) - lam(last_t)) / h
        D = (1 + 1 / (2 * r)) * z0 - 1 / (2 * r) * z0_last
    expected = sigma(800) / sigma(900) * z_t - alpha(800) * (math.exp(-h) - 1) * D
    got = s.dpm_step(z0, z_t, 900, 800, (last_t, z0_last) if last_t else None)
    assert torch.allclose(got, expected)
    assert torch.allclose(s.dpm_step(z0, z_t, 30, -1, (60, z0_last)), z0)  # order 1 at the end

def test_ddim_step_is_the_first_order_dpm_step():
    """With the same z0 both solve the same ODE to first order."""
    s, (z0, eps) = scheduler_of(), torch.randn(2, 1, 1, 4, 4).double()
    z_t = s.abar[700] ** 0.5 * z0 + (1 - s.abar[700]) ** 0.5 * eps
    assert torch.allclose(s.ddim_step(z0, eps, 600), s.dpm_step(z0, z_t, 700, 600))

# ---- 8. UNet, EMA, latent space, sampling -------------------------------------------------------
@pytest.mark.parametrize("channels, widths, downs, layers, side", [
    (4, (16, 24), 1, 1, (8, 8)), (3, (8, 16, 32), 2, 2, (8, 16)), (1, (8, 16, 24), 0, 1, (7, 5)),
    (2, (16, 16, 16, 16), 1, 1, (6, 6))])
def test_unet_returns_the_shape_of_its_input(channels, widths, downs, layers, side):
    """For several depths, numbers of halvings and sides; at first it predicts no more than a
    bias."""
    unet, z = ldm.UNet(channels, widths, downs, layers), torch.randn(2, channels, *side)
    out = unet(z, torch.tensor([0, 999]))
    assert out.shape == z.shape and out.std((0, 2, 3)).max() < 1e-6

def test_unet_depends_on_the_step_and_on_each_image_alone():
    """Another t changes the answer; the other images of the batch do not."""
    unet, z = shaken(ldm.UNet(2, (16, 24), 1, 1)), torch.randn(3, 2, 8, 8)
    early, late = unet(z, torch.tensor([5] * 3)), unet(z, torch.tensor([800] * 3))
    assert (early - late).abs().mean() > 1e-3
    mixed = unet(z, torch.tensor([5, 800, 5]))
    assert torch.allclose(mixed, torch.stack([early[0], late[1], early[2]]), atol=1e-5)

def test_ema_warms_up_then_keeps_its_limit():
    """The decay is (1 + n) / (10 + n) until that exceeds the limit."""
    for step, decay in ((0, 0.1), (90, 0.91), (10 ** 6, 0.99)):
        ema, model = nn.Linear(1, 1), nn.Linear(1, 1)
        nn.init.constant_(ema.weight, 1.0), nn.init.constant_(model.weight, 0.0)
        ldm.update_ema(ema, model, step, limit=0.99)
        assert ema.weight.item() == pytest.approx(decay) and model.weight.item() == 0

@pytest.mark.parametrize("ema, same", [(0, True), (0.5, False)])
def test_autoencoder_in_use_is_the_average_of_the_trained_one(train, tmp_path, ema, same):
    """With --ema 0 it is the last one itself; else each of its weights is between old and new."""
    assert train("train-ae", tmp_path / "out", "--steps", 3, "--ema", ema) == 0
    parts = load(tmp_path / "out" / "ae.pt")["parts"]
    for name, w in parts["ae"].items():
        if name not in ("usage", "codebook"):
            assert torch.equal(parts["ema"][name], w) == same, name

def test_latent_space_undoes_the_normalisation_before_decoding():
    """decode gives the autoencoder z * std + mean, and clamps pixels only."""
    seen, mean, std = [], torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    class Decoder(nn.Module):
        def decode(self, z):
            seen.append(z)
            return 5 * z
    space = ldm.LatentSpace(Decoder(), mean.view(1, 2, 1, 1), std.view(1, 2, 1, 1))
    x = space.decode(torch.ones(1, 2, 4, 4))
    assert torch.equal(seen[0][0, :, 0, 0], torch.tensor([1.5, 1.0])) and x.max() == 1
    assert PIXELS.decode(torch.tensor([[[[0.3]]]])).item() == pytest.approx(0.3)

@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_sampled_image_does_not_depend_on_n_or_batch(sampler):
    """Image i is the same in any company; another seed or index is another image."""
    unet, s = shaken(ldm.UNet(1, (16, 16), 1, 1)), scheduler_of("v")
    draw = lambda n, seed, batch: ldm.sample_images(unet, s, PIXELS, (1, 8, 8), n, seed, sampler, 4,
                                                    batch)
    x = draw(5, 3, 2)
    assert x.shape == (5, 1, 8, 8) and x.abs().max() <= 1 and not x.requires_grad
    assert torch.allclose(x[:3], draw(3, 3, 64), atol=1e-4)
    images = torch.cat([x, draw(2, 4, 2)]).flatten(1)
    assert (torch.cdist(images, images) + torch.eye(7)).min() > 0.1

# ---- 9. Runs: checkpoints -----------------------------------------------------------------------
def test_file_is_whole_or_not_there(tmp_path):
    """A write that fails keeps the old file and leaves no remains."""
    with ldm.new_file(tmp_path / "deep" / "a") as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt):
        with ldm.new_file(tmp_path / "deep" / "a") as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt
    assert (tmp_path / "deep" / "a").read_bytes() == b"old"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]

def test_checkpoints_hold_everything_and_execute_nothing(trained):
    """Weights, EMA, optimisers, scaler, step, settings, latent statistics; weights_only loads."""
    ae, unet = load(trained / "ae.pt"), load(trained / "ldm.pt")
    assert set(ae["parts"]) == {"ae", "ema", "disc", "opt", "opt_d", "scaler"}
    assert set(unet["parts"]) == {"unet", "ema", "opt", "scaler"}
    assert ae["step"] == unet["step"] == 4 and unet["config"]["lr"] == 2e-3
    assert ae["parts"]["opt"]["state"][0]["step"] == 4
    assert unet["extra"]["mean"].shape == unet["extra"]["std"].shape == (1, 2, 1, 1)
    assert_same(unet["extra"]["ae"]["weights"], ae["parts"]["ema"])
    for parts, net, some in ((unet["parts"], "unet", "conv_in.weight"),
                             (ae["parts"], "ae", "encoder.0.weight")):
        assert not torch.equal(parts["ema"][some], parts[net][some])
    assert not any("_orig_mod" in k for k in unet["parts"]["unet"])

def test_sampling_uses_the_weight_average(trained):
    """load_ldm gives EMA weights, frozen, and the autoencoder of the training."""
    (unet, s, space, shape), config = ldm.load_ldm(trained / "ldm.pt", CPU)
    ckpt = load(trained / "ldm.pt")
    assert_same(dict(unet.state_dict()), dict(ckpt["parts"]["ema"]))
    assert_same(dict(space.ae.state_dict()), dict(load(trained / "ae.pt")["parts"]["ema"]))
    assert shape == [2, 8, 8] and s.target == "v" and config["size"] == 16
    assert not any(p.requires_grad for p in [*unet.parameters(), *space.ae.parameters()])

def test_run_folder_has_a_log_curves_and_pictures(trained):
    """A CSV with a row per log line, and pictures that PIL opens."""
    for stage, column in (("ae", "recon"), ("ldm", "loss")):
        rows = log_of(trained, stage)
        assert [int(r["step"]) for r in rows] == [2, 4]
        assert all(math.isfinite(float(r[column])) for r in rows)
    for name in ("curves.png", "pictures/ae-000004.png", "pictures/ldm-000004.png"):
        with Image.open(trained / name) as image:
            image.load()
            assert min(image.size) > 100 and len(image.convert("L").getcolors(256)) > 2
    assert not list(trained.rglob("*.tmp"))

@pytest.mark.parametrize("flags", [
    ["train-ae", "--accum", 2], ["train-ae", "--ae", "kl", *GAN], ["train-ldm", "--accum", 2],
    ["train-ldm", "--space", "pixel", "--target", "eps", "--size", 16]],
    ids=lambda f: " ".join(map(str, f)))
def test_stopped_and_resumed_equals_one_go(train, trained, tmp_path, flags, capsys):
    """Two steps, then two more: every tensor of the checkpoint is that of four steps, bit for
    bit."""
    stage = flags[0].removeprefix("train-")
    for name, runs in (("once", (4,)), ("twice", (2, 4))):
        if stage == "ldm":
            (tmp_path / name).mkdir()
            shutil.copy(trained / "ae.pt", tmp_path / name)
        for steps in runs:
            assert train(flags[0], tmp_path / name, *flags[1:], "--steps", steps) == 0
    assert "going on at step 2 of 4" in capsys.readouterr().out
    once, twice = (load(tmp_path / name / f"{stage}.pt") for name in ("once", "twice"))
    assert once["step"] == twice["step"] == 4
    assert_same(once["parts"], twice["parts"])

@pytest.mark.parametrize("command, flag, value", [
    ("train-ae", "--lr", 1e-4), ("train-ae", "--z-channels", 3), ("train-ae", "--ae", "kl"),
    ("train-ae", "--no-flip", ""), ("train-ldm", "--widths", 32), ("train-ldm", "--seed", 1),
    ("train-ldm", "--target", "eps")])
def test_resuming_with_other_settings_is_refused(train, trained, capsys, command, flag, value):
    """The message names the flag; the checkpoint stays as it is."""
    path = trained / f"{command.removeprefix('train-')}.pt"
    before = path.read_bytes()
    values = [value] if value != "" else []
    capsys.readouterr()
    code = train(command, trained, flag, *values * (2 if flag == "--widths" else 1), "--steps", 9)
    assert_refused(capsys, code, flag.replace("no-", ""), path.name)
    assert path.read_bytes() == before

class Trap:
    """An object whose unpickling would make a folder."""
    def __reduce__(self):
        return os.mkdir, ("trap",)

def test_damaged_and_foreign_checkpoints_are_refused(train, trained, tmp_path, capsys):
    """Cut off, of the other stage, of another program, no archive, code: one sentence each."""
    whole = (trained / "ae.pt").read_bytes()
    torch.save({"state_dict": torch.zeros(2)}, tmp_path / "foreign")
    torch.save(Trap(), tmp_path / "code")
    path = tmp_path / "out" / "ae.pt"
    path.parent.mkdir()
    for content in (whole[:len(whole) // 2], b"", b"<html>", (trained / "ldm.pt").read_bytes(),
                    (tmp_path / "foreign").read_bytes(), (tmp_path / "code").read_bytes()):
        path.write_bytes(content)
        capsys.readouterr()
        for command in ("train-ae", "train-ldm"):
            assert_refused(capsys, train(command, path.parent), path)
        assert path.read_bytes() == content
    assert not (tmp_path / "trap").exists()

def test_ctrl_c_saves_and_the_same_command_goes_on(train, faces, tmp_path, capsys):
    """SIGINT ends a real process with 130 after saving the step at hand."""
    flags = ["train-ae", "--data", faces, "--data-root", tmp_path, "--out", tmp_path / "out", *AE,
             "--log-every", 1, "--save-every", 10 ** 6, "--steps"]
    flags = [str(f) for f in flags]
    process = subprocess.Popen([sys.executable, HERE / "ldm.py", *flags, "100000"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "ae.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    step = load(tmp_path / "out" / "ae.pt")["step"]
    assert process.returncode == 130 and f"stopped at step {step} and saved" in out, out
    assert "Traceback" not in out and step > 0
    assert ldm.main([*flags, str(step + 2)]) == 0
    assert load(tmp_path / "out" / "ae.pt")["step"] == step + 2

def test_loss_that_is_not_finite_stops_the_run(train, tmp_path, monkeypatch, capsys):
    """Code 2 names the term and the step; the last good checkpoint is still there."""
    assert train("train-ae", tmp_path / "out", "--steps", 2) == 0
    before, mse = (tmp_path / "out" / "ae.pt").read_bytes(), F.mse_loss
    monkeypatch.setattr(ldm.F, "mse_loss", lambda a, b: mse(a, b) * math.nan)
    capsys.readouterr()
    code = train("train-ae", tmp_path / "out", "--steps", 9, "--save-every", 1)
    assert_refused(capsys, code, "commit is nan", "at step 3", tmp_path / "out" / "ae.pt", "--lr")
    assert (tmp_path / "out" / "ae.pt").read_bytes() == before

@pytest.mark.parametrize("command", ["train-ae", "train-ldm"])
def test_weights_that_are_not_finite_are_never_saved(train, trained, tmp_path, monkeypatch, capsys,
                                                     command):
    """A gradient that overflows poisons the weights while the loss of that step is still fine."""
    (tmp_path / "out").mkdir()
    if command == "train-ldm":
        shutil.copy(trained / "ae.pt", tmp_path / "out")
    optimise = ldm.optimise
    def overflow(scaler, optimiser, net):
        for p in net.parameters():
            p.grad.fill_(math.inf)
        optimise(scaler, optimiser, net)
    monkeypatch.setattr(ldm, "optimise", overflow)
    assert_refused(capsys, train(command, tmp_path / "out", "--steps", 1), "step 1", "--lr")
    assert not (tmp_path / "out" / f"{command.removeprefix('train-')}.pt").exists()

# ---- 10-12. Training ----------------------------------------------------------------------------
@pytest.mark.parametrize("flags", ["--ae vq", "--ae kl", "--ae vq --recon l2 --channels 1"])
def test_autoencoder_learns(train, tmp_path, flags):
    """The reconstruction loss falls by a third within 80 steps, the held-out PSNR rises."""
    code = train("train-ae", tmp_path / "out", *flags.split(), "--steps", 80, "--log-every", 10)
    assert code == 0
    rows = log_of(tmp_path / "out", "ae")
    first, last = float(rows[0]["recon"]), float(rows[-1]["recon"])
    assert last < first / 1.5, f"recon went from {first} to {last}"
    first, last = float(rows[0]["held_psnr"]), float(rows[-1]["held_psnr"])
    assert last > first + 1, f"PSNR went from {first} to {last}"

def test_perceptual_loss_trains_the_autoencoder(train, tmp_path, monkeypatch, vgg):
    """With LPIPS as the only loss the decoder moves."""
    monkeypatch.setattr(ldm, "vgg16_weights", lambda: vgg)
    flags = "--ae kl --perceptual-weight 1 --recon-weight 0 --kl-weight 0 --steps 2".split()
    assert train("train-ae", tmp_path / "out", *flags) == 0
    state = load(tmp_path / "out" / "ae.pt")["parts"]["opt"]["state"]
    assert all(s["exp_avg"].abs().max() > 0 for s in state.values() if s["exp_avg"].dim() == 4)
    assert 0 < float(log_of(tmp_path / "out", "ae")[0]["perceptual"]) < 2

def first_gradients(out, stage, *optimisers):
    """Adam's first moments after one step: 0.1 or 0.5 times the gradient of each weight."""
    parts = load(out / f"{stage}.pt")["parts"]
    return torch.cat([s["exp_avg"].flatten() for o in optimisers or ("opt",)
                      for s in parts[o]["state"].values()])

@pytest.fixture
def no_chance(monkeypatch):
    """Without noise, random steps and clipping, so that gradients can be compared."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.full(size, high // 2))
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)

@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_terms_of_the_loss_have_their_weights(train, tmp_path, kind, no_chance):
    """Ten times the weight is ten times the gradient, for each term."""
    def gradients(**weights):
        all_terms = dict(recon=0, codebook=0, commit=0, kl=0) | weights
        flags = [x for k, v in all_terms.items() for x in (f"--{k}-weight", v)]
        out = tmp_path / str(weights)
        assert train("train-ae", out, "--ae", kind, *flags, "--steps", 1) == 0
        return first_gradients(out, "ae")
    for term in ("recon", *(("codebook", "commit") if kind == "vq" else ("kl",))):
        one, ten = gradients(**{term: 1}), gradients(**{term: 10})
        assert one.abs().max() > 0
        assert (ten - 10 * one).norm() < 1e-3 * ten.norm(), term

@pytest.mark.parametrize("command, flags", [("train-ae", ["--ae", "kl"]), ("train-ldm", [])])
def test_accumulated_gradient_is_that_of_the_large_batch(train, trained, tmp_path, no_chance,
                                                         command, flags):
    """Twice 4 images with --accum 2 give the gradient of 8 images."""
    gradients, stage = [], command.removeprefix("train-")
    for batch, accum in ((8, 1), (4, 2)):
        out = tmp_path / str(batch)
        out.mkdir()
        if stage == "ldm":
            shutil.copy(trained / "ae.pt", out)
        assert train(command, out, *flags, "--no-flip", "--steps", 1, "--batch", batch,
                     "--accum", accum) == 0
        gradients.append(first_gradients(out, stage))
    assert gradients[0].abs().max() > 1e-3
    assert torch.allclose(*gradients, atol=1e-6, rtol=1e-3)

def test_repeating_a_batch_changes_no_gradient(train, tmp_path, monkeypatch, no_chance):
    """The mean of equal gradients: also for the discriminator, whose BatchNorm sees a batch."""
    monkeypatch.setattr(ldm, "batch_indices", lambda *_, **__: iter([torch.arange(4)] * 9))
    for accum in (1, 3):
        assert train("train-ae", tmp_path / str(accum), "--ae", "kl", *GAN, "--no-flip",
                     "--steps", 1, "--accum", accum) == 0
    once, thrice = (first_gradients(tmp_path / a, "ae", "opt", "opt_d") for a in "13")
    assert torch.allclose(once, thrice, atol=1e-6, rtol=1e-3) and once.abs().max() > 1e-3

@pytest.mark.parametrize("recon, value", [("l1", 0.3), ("l2", 0.09)])
def test_reconstruction_loss_is_the_mean_error(train, tmp_path, monkeypatch, recon, value):
    """An error of 0.3 everywhere is 0.3 as l1 and 0.09 as l2."""
    monkeypatch.setattr(ldm.VAE, "forward", lambda self, x: (
        x + 0.3 + 0 * self.decoder[0].bias.sum(), {}))
    assert train("train-ae", tmp_path / "out", "--ae", "kl", "--recon", recon, "--steps", 1) == 0
    assert float(log_of(tmp_path / "out", "ae")[0]["recon"]) == pytest.approx(value, rel=1e-4)

@pytest.mark.parametrize("accum", [1, 3])
def test_codes_restart_once_per_hundred_steps(train, tmp_path, monkeypatch, accum):
    """Also with --accum: a second restart in the same step would move codes that are in use but
    not in the first of its batches."""
    calls, restart = [], ldm.VQVAE.restart_codes
    def counted(self, z_e):
        calls.append(len(z_e))
        restart(self, z_e)
    monkeypatch.setattr(ldm.VQVAE, "restart_codes", counted)
    assert train("train-ae", tmp_path / "out", "--accum", accum, "--steps", 102) == 0
    assert len(calls) == 2

def test_learning_rate_warms_up_and_gradients_are_clipped(train, tmp_path, monkeypatch):
    """It rises evenly to --lr over --warmup steps; the gradient's norm is at most 1."""
    rates, norms, optimise = [], [], ldm.optimise
    def spied(scaler, optimiser, net):
        rates.append(optimiser.param_groups[0]["lr"])
        for p in net.parameters():
            p.grad.mul_(1e4)
        clip = nn.utils.clip_grad_norm_
        step = optimiser.step
        optimiser.step = lambda: (norms.append(sum(p.grad.square().sum() for p in
                                                   net.parameters()).sqrt()), step())[1]
        optimise(scaler, optimiser, net)
        optimiser.step = step
        assert all(p.grad is None for p in net.parameters())
    monkeypatch.setattr(ldm, "optimise", spied)
    assert train("train-ae", tmp_path / "out", "--warmup", 4, "--lr", 1e-3, "--steps", 6) == 0
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert [float(n) for n in norms] == pytest.approx([1.0] * 6, abs=1e-3)

@pytest.mark.parametrize("flags", ["", "--target eps", "--schedule cosine",
                                   "--space pixel --size 16"])
def test_diffusion_learns(train, trained, tmp_path, flags):
    """Latents or pixels, v or eps: the loss falls well below that of predicting nothing."""
    (tmp_path / "out").mkdir()
    shutil.copy(trained / "ae.pt", tmp_path / "out")
    code = train("train-ldm", tmp_path / "out", *flags.split(), "--steps", 80, "--log-every", 20)
    rows = log_of(tmp_path / "out", "ldm")
    first, last = float(rows[0]["loss"]), float(rows[-1]["loss"])
    assert code == 0 and last < 0.85 * first, f"loss went from {first} to {last}"

def test_unet_sees_latents_of_mean_zero_and_deviation_one(train, trained, tmp_path, monkeypatch):
    """One epoch of all 36 images and their mirror images, normalised per channel."""
    (tmp_path / "out").mkdir()
    shutil.copy(trained / "ae.pt", tmp_path / "out")
    seen, steps, add_noise = [], [], ldm.NoiseScheduler.add_noise
    def spied(self, z0, eps, t):
        seen.append(z0)
        steps.append(t)
        return add_noise(self, z0, eps, t)
    monkeypatch.setattr(ldm.NoiseScheduler, "add_noise", spied)
    assert train("train-ldm", tmp_path / "out", "--batch", 18, "--steps", 4) == 0
    z = torch.cat(seen)
    std, mean = torch.std_mean(z, (0, 2, 3))
    assert len(z.flatten(1).unique(dim=0)) == 72 and z.shape[1:] == (2, 8, 8)
    assert mean.abs().max() < 1e-4 and (std - 1).abs().max() < 1e-4
    assert torch.cat(steps).min() < 200 and torch.cat(steps).max() > 800  # all of 0 .. T-1

def test_latents_of_another_autoencoder_are_never_used(train, trained, tmp_path, capsys):
    """After more steps of stage 1 they are encoded again; ldm.pt of the old one is refused."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (old,) = load(out / "latents.pt").values()
    assert train("train-ae", out, "--steps", 6) == 0
    capsys.readouterr()
    assert_refused(capsys, train("train-ldm", out, "--steps", 6), "ldm.pt", "another ae.pt")
    (out / "ldm.pt").unlink()
    assert train("train-ldm", out, "--steps", 1) == 0
    (new,) = load(out / "latents.pt").values()
    assert new.shape == old.shape == (72, 2, 8, 8) and not torch.equal(new, old)

def test_latents_of_other_images_are_never_used(trained, tmp_path):
    """The same number of images in another order are encoded anew; the same are not."""
    ckpt, images = load(trained / "ae.pt"), ldm.toyfaces(range(100), 16)
    ae = ldm.build_autoencoder(ckpt["config"], ckpt["parts"]["ema"])
    cfg, encoded = ldm.LDMConfig(out=str(tmp_path), flip=False), []
    ae.encode = lambda x, encode=ae.encode: (encoded.append(len(x)), encode(x))[1]
    first = ldm.load_latents(cfg, ae, "name", images, CPU, None)
    assert torch.equal(ldm.load_latents(cfg, ae, "name", images, CPU, None), first)
    assert sum(encoded) == 100
    second = ldm.load_latents(cfg, ae, "name", images.flip(0), CPU, None)
    assert torch.allclose(second, first.flip(0), atol=1e-2) and sum(encoded) == 200

@pytest.mark.parametrize("flags", [["train-ae", *GAN], ["train-ae", "--ae", "kl"], ["train-ldm"]],
                         ids=lambda f: " ".join(f))
def test_bf16_trains_on_the_cpu(train, trained, tmp_path, flags):
    """--amp bf16 needs no GPU, and weights stay float32."""
    (tmp_path / "out").mkdir()
    if flags[0] == "train-ldm":
        shutil.copy(trained / "ae.pt", tmp_path / "out")
    assert train(flags[0], tmp_path / "out", *flags[1:], "--amp", "bf16", "--steps", 3) == 0
    parts = load(tmp_path / "out" / f"{flags[0].removeprefix('train-')}.pt")["parts"]
    weights = (parts.get("ae") or parts.get("ema")).values()
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights)

# ---- 13. Sampling and evaluation ----------------------------------------------------------------
def use(command, out, *flags):
    return ldm.main([command, "--out", str(out), "--device", "cpu", *map(str, flags)])

@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_sample_writes_pictures(trained, tmp_path, sampler):
    """A grid; on request each image and the denoising as a strip and a GIF."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    assert use("sample", out, "--sampler", sampler, "--steps", 5, "--n", 3, "--batch", 2,
               "--save-images", "--progress") == 0
    images = [f"samples/0000{i}.png" for i in range(3)]
    for name in ("samples.png", "progress.png", "progress.gif", *images):
        with Image.open(out / name) as image:
            image.load()
            assert image.size == (16, 16) or not name.startswith("samples/")
            if name == "progress.gif":  # PIL merges frames that are equal
                assert 2 <= image.n_frames <= 6  # 5 steps and the result
    assert len(list((out / "samples").iterdir())) == 3

def test_newest_run_is_sampled_unless_named(trained, tmp_path, capsys):
    """Without --out and --data, sample takes the newest run under runs/."""
    for i, name in enumerate(("old", "new")):
        shutil.copytree(trained, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "ldm.pt", (1e9 + i, 1e9 + i))
    flags = ["--n", "1", "--steps", "1", "--device", "cpu"]
    assert ldm.main(["sample", *flags]) == 0
    assert (tmp_path / "runs/new/samples.png").exists()
    assert not (tmp_path / "runs/old/samples.png").exists()
    assert ldm.main(["sample", "--data", "old", *flags]) == 0
    assert (tmp_path / "runs/old/samples.png").exists()

def test_frechet_distance_of_known_gaussians():
    """Zero for equal features, and the closed form for exactly Gaussian moments."""
    x = torch.randn(500, 4, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # mean 0, covariance 1
    spread, shift = torch.tensor([1.0, 2, 0.5, 3]).double(), torch.tensor([1.0, 0, -2, 0]).double()
    assert float(ldm.frechet_distance(x, x)) == pytest.approx(0, abs=1e-9)
    expected = shift.square().sum() + (spread - 1).square().sum()
    assert float(ldm.frechet_distance(x, x * spread + shift)) == pytest.approx(float(expected))
    A, B = torch.randn(2, 4, 4, dtype=torch.float64)  # covariances that do not commute
    S_a, S_b = A @ A.T, B @ B.T
    roots = torch.linalg.eigvals(S_a @ S_b).real.sqrt().sum()
    expected = S_a.trace() + S_b.trace() - 2 * roots
    assert float(ldm.frechet_distance(x @ A.T, x @ B.T)) == pytest.approx(float(expected))

def test_psnr_of_a_known_error():
    """An error of 0.2 everywhere is 20 dB, per image."""
    x = torch.zeros(2, 3, 4, 4)
    assert ldm.psnr(x + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1), x).tolist() == pytest.approx(
        [20, 40])
    assert ldm.psnr(x, x).isfinite().all()

def test_eval_without_vgg_prints_what_it_can(trained, capsys, monkeypatch):
    """PSNR and codebook use come without VGG16, and it says what is missing."""
    def missing():
        raise ldm.UserError("no VGG16 here")
    monkeypatch.setattr(ldm, "vgg16_weights", missing)
    assert use("eval", trained) == 0
    out = capsys.readouterr().out
    assert "PSNR" in out and "codes in use" in out and "no VGG16 here" in out
    assert "on 4 held-out images, side 16" in out and "FD, reconstructions" not in out

def test_eval_with_vgg_prints_all_figures(trained, faces, tmp_path, capsys, monkeypatch, vgg):
    """LPIPS and Frechet distances are there and finite; PSNR is that of held-out images."""
    monkeypatch.setattr(ldm, "vgg16_weights", lambda: vgg)
    cfg = ldm.resolve(ldm.SampleConfig, {"out": str(trained), "n": 4, "steps": 2, "device": "cpu"})
    table = {name: float(value) for name, value in ldm.evaluate(cfg).items()}
    out = capsys.readouterr().out
    assert all(math.isfinite(v) for v in table.values()) and all(name in out for name in table)
    for word in ("PSNR", "LPIPS", "perplexity", "training images", "reconstructions", "4 samples"):
        assert any(word in name for name in table), word
    _, held = ldm.load_images(str(faces), tmp_path, 16, 3)
    ckpt, x = load(trained / "ae.pt"), ldm.to_float(held, CPU)
    ae = ldm.build_autoencoder(ckpt["config"], ckpt["parts"]["ema"])
    mse = (ae.decode(ae.encode(x)).clamp(-1, 1) - x).square().mean((1, 2, 3))
    assert table["PSNR, dB"] == pytest.approx(float((10 * torch.log10(4 / mse)).mean()), abs=1e-3)

def test_saved_images_are_rounded_not_cut():
    """A value just below 128 / 255 is 128 in the picture; what came from a file is unchanged."""
    x = ldm.to_float(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), CPU)
    for change in (0, -0.3 / 127.5, 0.3 / 127.5):
        picture = np.asarray(ldm.image_grid(x + change, 1))[2:-2, 2:-2, 0]  # without the frame
        assert np.array_equal(picture[::6, ::6].flatten(), np.arange(256)), change

# ---- 14. Command line ---------------------------------------------------------------------------
@pytest.mark.parametrize("line, words", [
    ("sample", "ldm.pt train-ldm"), ("eval --out nowhere", "ldm.pt nowhere"),
    ("train-ldm", "ae.pt train-ae"), ("train-ae --data nope", "--data nope"),
    ("train-ae --data .", "--data no images"), ("train-ae --data celebhq", "--data celebhq"),
    ("train-ae --device cuda", "--device cuda"), ("train-ae --device mps", "--device mps"),
    ("sample --device cuda", "--device cuda"), ("train-ae --size 30 --widths 8 16 32", "--size 30"),
    ("train-ae --size 4", "--size 4"), ("train-ae --widths 8", "--widths"),
    ("train-ae --widths 6 12", "--widths heads"), ("train-ldm --widths 8 -4", "--widths"),
    ("train-ldm --widths 8 16 --downs 2", "--downs 2"), ("train-ae --steps 0", "--steps 0"),
    ("train-ae --lr nan", "--lr nan"), ("train-ae --lr inf", "--lr inf"),
    ("train-ae --lr -1", "--lr -1"), ("train-ae --gan-weight nan", "--gan-weight nan"),
    ("train-ae --disc-start 10 --steps 5 --gan-weight 0.1", "--disc-start 10"),
    ("train-ae --seed -1", "--seed -1"),
    ("train-ae --amp fp16 --device cpu", "--amp fp16"), ("sample --steps 1001", "--steps 1001"),
    ("train-ldm --ema 1.5", "--ema 1.5"), ("sample --batch 0", "--batch 0"),
    ("train-ldm --space pixel --size 128", "--size 128"),
    ("train-ldm --target eps --schedule cosine", "--target eps --schedule"),
    ("train-ae --seed 1000000000000000000", "--seed"), ("train-ae --batch 0", "--batch 0"),
    ("train-ae --accum 0", "--accum 0"), ("train-ae --warmup -1", "--warmup -1"),
    ("train-ae --layers 0", "--layers 0"), ("train-ae --log-every 0", "--log-every 0"),
    ("train-ae --save-every -5", "--save-every -5"), ("train-ae --z-channels 0", "--z-channels 0"),
    ("train-ae --codebook-size 1", "--codebook-size 1"), ("train-ae --size -8", "--size -8"),
    ("train-ae --recon-weight -1", "--recon-weight -1"),
    ("train-ae --kl-weight inf", "--kl-weight"),
    ("train-ae --commit-weight nan", "--commit-weight nan"), ("train-ae --lr 0", "--lr 0"),
    ("train-ae --disc-start -1", "--disc-start -1"), ("train-ae --widths 0 0", "--widths (0, 0)"),
    ("train-ae --size 257 --widths 8 16", "--size 257 multiple 256"),
    ("train-ae --size 8 --batch 1 --gan-weight 0.1", "--batch 1 --size 16 --gan-weight 0"),
    ("train-ldm --downs -1", "--downs -1"), ("train-ldm --ema -0.1", "--ema -0.1"),
    ("train-ldm --size -1", "--size -1"), ("train-ldm --widths 16", "--widths two or more"),
    ("train-ldm --lr nan", "--lr nan"), ("train-ldm --accum -1", "--accum -1"),
    ("train-ldm --space pixel --size 64 --data nope", "--data nope"),
    ("train-ldm --out nowhere", "ae.pt nowhere"), ("sample --n -1", "--n -1"),
    ("sample --steps 0", "--steps 0"), ("sample --seed -1", "--seed -1"),
    ("sample --data nope", "ldm.pt nope"), ("eval --batch -2", "--batch -2"),
    ("eval --device mps", "--device mps"), ("demo --seed -3", "--seed -3"),
    ("demo --device cuda", "--device cuda"), ("demo --amp fp16 --device cpu", "--amp fp16")])
def test_mistakes_cost_one_sentence_and_create_nothing(tmp_path, capsys, monkeypatch, line, words):
    """Exit code 2 and a line that names the flag: no traceback, no files."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(ldm, "toyfaces", lambda indices, size: torch.zeros(
        len(indices), 3, size, size, dtype=torch.uint8))  # quicker
    monkeypatch.setattr(ldm, "LPIPS", None)  # nor is VGG16 downloaded first
    empty = "--data-root empty".split() if "train-ae" in line else []
    assert_refused(capsys, ldm.main([*line.split(), *empty]), *words.split())
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("line", ["", "train", "train-ae --nope 1", "train-ae --gan wgan",
                                  "train-ae --steps many", "sample --sampler euler",
                                  "train-ae --channels 4", "train-ae --amp bf8", "eval --n 1.5",
                                  "train-ae --recon l3", "train-ae --device tpu", "sample --n all",
                                  "train-ldm --target x0", "train-ldm --schedule sigmoid",
                                  "train-ldm --space z", "train-ae --widths a b", "demo --steps 5",
                                  "train-ae --lr fast", "train-ae --ae vae", "sample --n"])
def test_unknown_words_are_argparse_errors(line, capsys):
    """argparse explains them itself in a line below the usage, and exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        ldm.main(line.split())
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "error:" in err and len(err.splitlines()) <= 2
    assert all(word in err for word in line.split() if word.startswith("--"))

def test_mistake_is_answered_a_second_after_torch_is_there(tmp_path):
    """From the shell; importing torch takes 2 to 13 s, as busy as the machine is."""
    def timed(*line):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *line], capture_output=True, text=True)
        return time.perf_counter() - start, done
    importing, _ = timed("-c", "import torch, torchvision")
    took, done = timed(HERE / "ldm.py", "train-ae", "--size", "30", "--data-root", tmp_path)
    assert took < 1.5 * importing + 1 and done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())

@pytest.mark.parametrize("command", ldm.COMMANDS)
def test_help_lists_every_flag_with_its_default(command, capsys, monkeypatch):
    """Nothing is configurable that --help does not show."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stopped:
        ldm.main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for f in fields(ldm.COMMANDS[command][0]):
        assert f"--{f.name}".replace("_", "-") in text
        assert f"{f.metadata['help']} (default: {f.default}" in " ".join(text.split()), f.name

def test_out_of_memory_names_the_batch(monkeypatch, capsys):
    """PyTorch's long message becomes advice; other errors of PyTorch stay visible."""
    def fail(text):
        def command(cfg):
            raise RuntimeError(text)
        monkeypatch.setitem(ldm.COMMANDS, "sample", (ldm.SampleConfig, command, ""))
        return ldm.main(["sample"])
    assert_refused(capsys, fail("CUDA out of memory. Tried to allocate 2 GiB"), "--batch")
    assert_refused(capsys, fail("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "--batch")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fail("mat1 and mat2 shapes cannot be multiplied")

def test_demo_runs_both_stages_and_samples(tmp_path, monkeypatch, capsys):
    """demo is train-ae, train-ldm and sample with the presets of the data set."""
    ran = []
    for name in ("train_ae", "train_ldm", "sample"):
        monkeypatch.setattr(ldm, name, lambda cfg, name=name: ran.append((name, cfg)))
    assert ldm.main(["demo", "--seed", "3"]) == 0
    assert [name for name, _ in ran] == ["train_ae", "train_ldm", "sample"]
    assert {cfg.out for _, cfg in ran} == {str(Path("runs", "toyfaces"))}
    assert all(cfg.seed == 3 for _, cfg in ran) and ran[0][1].size == 32
    assert ran[2][1].progress and ran[2][1].n == 64

def test_eval_takes_the_run_touched_last(trained, tmp_path):
    """A run that has only its autoencoder yet counts, too; in one folder ldm.pt goes first."""
    for i, (name, files) in enumerate({"both": ("ae.pt", "ldm.pt"), "young": ("ae.pt",)}.items()):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(trained / file, tmp_path / "runs" / name)
            os.utime(tmp_path / "runs" / name / file, (1000 + i, 1000 + i))
    cfg = ldm.resolve(ldm.SampleConfig, {})
    assert ldm.find_run(cfg, "ldm", "ae") == Path("runs", "young", "ae.pt")
    os.utime(tmp_path / "runs" / "both" / "ae.pt", (2000, 2000))
    assert ldm.find_run(cfg, "ldm", "ae") == Path("runs", "both", "ldm.pt")

def test_run_goes_on_on_another_kind_of_device(train, trained, tmp_path):
    """A checkpoint of fp16 training holds the state of its GradScaler; elsewhere that is off."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    ckpt = torch.load(out / "ae.pt", weights_only=True)
    assert ckpt["parts"]["scaler"] == {}
    ckpt["parts"]["scaler"] = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                               "growth_interval": 2000, "_growth_tracker": 3}
    torch.save(ckpt, out / "ae.pt")
    assert train("train-ae", out, "--steps", 5, "--log-every", 2) == 0

def test_frechet_distance_of_one_image_is_not_a_number():
    """A covariance takes two; eval of a tiny folder says nan and goes on."""
    assert math.isnan(ldm.frechet_distance(torch.randn(1, 4), torch.randn(9, 4)))

README = (HERE / "README.md").read_text()

def test_readme_shows_small_pictures():
    """Its pictures exist, no others do, and they take less than 1 MB in all."""
    pictures = re.findall(r"\((assets/[^)]+)\)", README)
    assert pictures and sum((HERE / p).stat().st_size for p in pictures) < 1_000_000
    assert {p.name for p in (HERE / "assets").iterdir()} == {Path(p).name for p in pictures}

@pytest.mark.parametrize("command", ldm.COMMANDS)
def test_readme_has_every_flag_with_its_defaults(command):
    """The tables of flags are those of the code."""
    for f in fields(ldm.COMMANDS[command][0]):
        show = lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else str(v) or "empty"
        default = "; ".join([show(f.default)] + [
            f"{data} {show(v)}" for data, v in f.metadata["presets"].items()])
        row = f"| `--{f.name.replace('_', '-')}` | {default} | {f.metadata['help']}"
        assert row in README, row

def readme_commands():
    """Every `python ldm.py ...` in the README's code blocks, loop variables replaced."""
    loop = {"$s": "dpm", "$k": "10", "$r": "x", "$ae": "kl"}
    for block in re.findall(r"```\n(.*?)```", README, re.S):
        for name, value in loop.items():
            block = re.sub(re.escape(name) + r"\b", value, block)
        for line in re.findall(r"python ldm\.py ([^#;&\n]+)", block):
            yield line.strip()

@pytest.mark.parametrize("line", sorted(set(readme_commands())))
def test_readme_commands_are_accepted(line):
    """Each command line of the README has a known subcommand, known flags and valid values."""
    given = vars(ldm.build_parser().parse_args(line.split()))
    ldm.resolve(ldm.COMMANDS[given.pop("command")][0], given)

def test_readme_notebook_cell_trains_and_samples(monkeypatch):
    """At most 15 lines: import ldm, ten steps of both stages, sixteen pictures."""
    noise = lambda i, size: torch.randint(256, (len(i), 3, size, size), dtype=torch.uint8)
    monkeypatch.setattr(ldm, "toyfaces", noise)  # drawing all 9216 faces takes some seconds
    cell = re.search(r"```python\n(.*?)```", README, re.S)[1]
    names = {}
    exec(cell, names)
    assert len(cell.splitlines()) <= 15 and names["images"].shape == (16, 3, 32, 32)
    assert names["images"].isfinite().all() and names["images"].abs().max() <= 1

BLOCKS = "GroupNorm norm_silu_conv ResBlock Attention Layers DownBlock MidBlock UpBlock"
TO_COPY = {"VQVAE": f"{BLOCKS} build_encoder build_decoder", "VAE": f"{BLOCKS} build_encoder "
           "build_decoder", "LPIPS": "UserError vgg16_weights", "PatchGAN": "",
           "NoiseScheduler": "", "UNet": f"{BLOCKS} TimeEmbedding"}

@pytest.mark.parametrize("name", TO_COPY)
def test_each_class_can_be_copied_out_of_the_file(name, vgg):
    """With the parts that the README names, and the usual imports, it works in another file."""
    text = (HERE / "ldm.py").read_text()
    parts = {n.name: ast.get_source_segment(text, n) for n in ast.parse(text).body
             if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    copied = dict(math=math, np=np, torch=torch, nn=nn, F=F, models=models, Path=Path)
    exec("\n".join(parts[n] for n in [*TO_COPY[name].split(), name]), copied)
    cls, x, z = copied[name], torch.randn(2, 3, 32, 32), torch.randn(2, 4, 8, 8)
    out = {"VQVAE": lambda: cls(3, (8, 16), 1, 4, 16)(x)[0],
           "VAE": lambda: cls(3, (8, 16), 1, 4)(x)[0], "PatchGAN": lambda: cls()(x),
           "LPIPS": lambda: cls(HERE / "lpips_weights.pth", vgg)(x, -x),
           "NoiseScheduler": lambda: cls().ddim_step(z, z, 5),
           "UNet": lambda: cls(4, (8, 16), 1, 1)(z, torch.tensor([3, 9]))}[name]()
    assert out.isfinite().all()

def test_pictures_of_progress_end_with_the_sample(trained, tmp_path):
    """The last column of progress.png is what samples.png shows."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    assert use("sample", out, "--n", 2, "--steps", 3, "--progress") == 0
    strip, grid = (np.asarray(Image.open(out / f"{n}.png")) for n in ("progress", "samples"))
    cell = lambda row, column: (slice(2 + 98 * row, 98 + 98 * row),  # 96 pixels, frames of 2
                                slice(2 + 98 * column, 98 + 98 * column))
    assert np.abs(strip[cell(1, 7)].astype(int) - grid[cell(0, 0)]).max() <= 1

# ---- 15. Nothing lost, nothing silent -----------------------------------------------------------
SLOW = pytest.mark.skipif("SLOW" not in os.environ, reason="minutes; SLOW=1 pytest runs it too")

def damaged(content, kind, k):
    """content with one bit flipped, or cut off, somewhere that depends on k."""
    at = (k * 7919 + 13) * len(content) // 100_003 % len(content)
    if kind == "cut":
        return content[:at]
    return content[:at] + bytes([content[at] ^ (1 << k % 8)]) + content[at + 1:]

@pytest.mark.parametrize("kind", ["cut", "flip"])
@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_damaged_checkpoint_is_refused_or_read_unchanged(trained, tmp_path, stage, kind):
    """50 of each kind: never half of it, never another number (padding does not count)."""
    content, path, refused = (trained / f"{stage}.pt").read_bytes(), tmp_path / f"{stage}.pt", 0
    whole = ldm.load_checkpoint(trained / f"{stage}.pt", stage)
    for k in range(50):
        path.write_bytes(damaged(content, kind, k))
        try:
            assert_same(ldm.load_checkpoint(path, stage), whole)
        except ldm.UserError as error:
            refused += 1
            assert str(path) in str(error) and "delete it" in str(error)
    assert refused == 50 if kind == "cut" else refused >= 25

@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_damaged_image_cache_is_decoded_again(tmp_path, faces, kind):
    """One wrong bit anywhere in the cache is noticed, and costs a new decoding."""
    whole = ldm.load_folder(faces, 16, 3, tmp_path).clone()
    cache, = tmp_path.glob("*.rgb")
    content = cache.read_bytes()
    for k in range(10):
        cache.write_bytes(damaged(content, kind, k) or b"x")
        assert torch.equal(ldm.load_folder(faces, 16, 3, tmp_path), whole)
        assert cache.read_bytes() == content

def test_damaged_latents_are_encoded_again(train, trained, tmp_path):
    """A flipped bit in latents.pt changes nothing but the time."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    content = (out / "latents.pt").read_bytes()
    (out / "latents.pt").write_bytes(damaged(content, "flip", 5_000))
    assert train("train-ldm", out, "--steps", 5) == 0
    assert_same(load(out / "latents.pt"), load(trained / "latents.pt"))

@pytest.mark.parametrize("content", [b"<html>not found</html>", b"", "state"])
def test_wrong_lpips_weights_are_explained(tmp_path, vgg, content):
    """An HTML page, nothing, or another program's weights in place of lpips_weights.pth."""
    path = tmp_path / "lpips_weights.pth"
    path.write_bytes(content) if content != "state" else torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ldm.UserError, match="lpips_weights.pth missing or damaged: get it anew"):
        ldm.LPIPS(path, vgg)

@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("command, stage, limit", [
    ("train-ae", "ae", 20_000), ("train-ldm", "ldm", 50_000), ("train-ae", "ae", 100)])
def test_full_disk_is_one_sentence_and_costs_nothing(train, trained, tmp_path, capsys, command,
                                                     stage, limit):
    """What cannot be written whole is not written; the checkpoint before it is used later on."""
    import resource
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = (out / f"{stage}.pt").read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(before) > limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = train(command, out, "--steps", 6, "--log-every", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert_refused(capsys, code, "File too large")
    assert (out / f"{stage}.pt").read_bytes() == before and not list(out.glob("**/*.tmp"))
    assert train(command, out, "--steps", 6, "--log-every", 2) == 0

def test_left_over_pieces_of_killed_runs_go_away(tmp_path):
    """Half-written files of a run that was killed are deleted, those of a living one are not."""
    for name, age in (("a.pt.1.tmp", 700), ("a.pt.2.tmp", 5), ("b.pt.1.tmp", 700)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with ldm.new_file(tmp_path / "a.pt") as file:
        file.write(b"whole")
    assert {f.name for f in tmp_path.iterdir()} == {"a.pt", "a.pt.2.tmp", "b.pt.1.tmp"}

def test_linked_folders_are_searched_once_even_in_circles(tmp_path, faces):
    """A linked subfolder counts; links to a parent or to themselves do not run in circles."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "faces").symlink_to(faces)
    (tmp_path / "in" / "again").symlink_to(faces)
    (tmp_path / "in" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "me.png").symlink_to(tmp_path / "in" / "me.png")
    assert len(ldm.load_folder(tmp_path / "in", 16, 3, tmp_path / "cache")) == 40

def bad_files(folder):
    """Pictures that cannot be read, {name: why}, written into the folder."""
    face = Image.fromarray(ldm.toyfaces([0], 64)[0].permute(1, 2, 0).numpy())
    face.save(folder / "cut.jpg"), face.save(folder / "bomb.png")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:300])
    png = bytearray((folder / "bomb.png").read_bytes())
    png[16:24] = (20_000).to_bytes(4, "big") * 2  # the header claims 20,000 x 20,000
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(png)
    (folder / "empty.webp").write_bytes(b"")
    (folder / "text.jpg").write_text("I am no picture")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return ["cut.jpg", "bomb.png", "empty.webp", "text.jpg", "gone.png"]

def test_zoo_of_files_good_ones_come_out_right_bad_ones_are_named(tmp_path, capsys):
    """Odd names and formats are read; bombs, torn, empty and fake pictures are named, counted."""
    folder = tmp_path / "in"
    folder.mkdir()
    face = Image.fromarray(ldm.toyfaces([1], 16)[0].permute(1, 2, 0).numpy())
    for name in ("with space.png", "ünïcode 顔.png", "new\nline.png", "UPPER.PNG", "a.bmp"):
        face.save(folder / name)
    other = face.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    face.save(folder / "moving.gif", save_all=True, append_images=[other])
    face.save(folder / "lossless.webp", lossless=True)
    bad = bad_files(folder)
    images = ldm.load_folder(folder, 16, 3, tmp_path / "cache")
    out = capsys.readouterr().out
    assert all(repr(str(folder / name)) in out for name in bad) and "5 unreadable" in out
    expected = torch.from_numpy(np.array(face)).permute(2, 0, 1)
    exact = [(image.float() - expected).abs().max() <= 1 for image in images]
    assert len(images) == 7 and sum(exact) >= 6  # a GIF has 256 colours
    assert all((image.float() - expected).abs().mean() < 8 for image in images)

def test_skipped_steps_of_fp16_are_counted(train, tmp_path, monkeypatch):
    """With a GradScaler, the log says how many optimiser steps an overflow has cost."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(ldm, "pick_device", lambda cfg: (CPU, None))
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda device, enabled: scaler("cpu", init_scale=2.0 ** 127))
    flags = "--steps 30 --log-every 10 --recon-weight 100".split()
    assert train("train-ae", tmp_path, *flags) == 0
    skipped = [float(row["skipped"]) for row in log_of(tmp_path, "ae")]
    halvings = 127 - math.log2(load(tmp_path / "ae.pt")["parts"]["scaler"]["scale"])
    assert 0 < skipped[0] <= skipped[1] <= skipped[2] == halvings < 30

def test_new_run_in_an_old_folder_starts_a_new_log(train, trained, tmp_path):
    """Without its checkpoint, a run's old rows are not mixed with the new ones."""
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out" / "ae.pt").unlink()
    assert train("train-ae", tmp_path / "out", "--steps", 6, "--log-every", 3) == 0
    assert [row["step"] for row in log_of(tmp_path / "out", "ae")] == ["3", "6"]

def test_folder_names_may_have_spaces_and_any_letters(train, tmp_path):
    """Paths are only paths."""
    assert train("train-ae", tmp_path / "mein läuft 走る", "--steps", 2) == 0
    assert (tmp_path / "mein läuft 走る" / "ae.pt").exists()

def command_line(faces, root, out, command, *flags):
    tiny = {"train-ae": AE, "train-ldm": LDM}[command]
    return [sys.executable, str(HERE / "ldm.py"), command, "--data", str(faces), "--data-root",
            str(root), "--out", str(out), *tiny, *flags]

def killed_after(seconds, line, path):
    """Runs a training, kills it, returns the step of its checkpoint: at most 7 before the log's."""
    run = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=seconds)
    run.kill(), run.wait()
    step = ldm.load_checkpoint(path, path.stem)["step"] if path.exists() else 0
    logged = log_of(path.parent, path.stem)[-1]["step"] if step else 0
    assert int(logged) - step <= 7
    return step

@SLOW
def test_killed_thirty_times_and_still_the_same_weights(faces, tmp_path):
    """kill -9 at random moments: while it decodes, encodes, saves. At most --save-every steps
    are lost each time, and the final weights are those of an uninterrupted run, bit for bit."""
    rng = np.random.default_rng(0)
    for command, stage in (("train-ae", "ae"), ("train-ldm", "ldm")):
        line = lambda out: command_line(
            faces, tmp_path / f"root {out}", tmp_path / out, command, "--steps", "1500",
            "--save-every", "7", "--log-every", "7")
        path = tmp_path / "b" / f"{stage}.pt"
        shot = [killed_after(1 + 3 * rng.random(), line("b"), path) for _ in range(30)]
        for out in ("a", "b"):
            subprocess.run(line(out), check=True, capture_output=True)
        print(f"{command}: killed {len(shot)} times, the checkpoints were of steps {shot}")
        assert shot == sorted(shot)
        assert_same(load(path)["parts"], load(tmp_path / "a" / f"{stage}.pt")["parts"])

@SLOW
@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_many_damaged_checkpoints(trained, tmp_path, stage):
    """As above, 1000 times."""
    content, whole = (trained / f"{stage}.pt").read_bytes(), load(trained / f"{stage}.pt")
    refused = 0
    for k in range(1000):
        (tmp_path / "x.pt").write_bytes(damaged(content, ("cut", "flip")[k % 2], 31 * k))
        try:
            assert_same(ldm.load_checkpoint(tmp_path / "x.pt", stage), whole)
        except ldm.UserError:
            refused += 1
    print(f"{stage}.pt: {refused} of 1000 refused, {1000 - refused} read unchanged")
