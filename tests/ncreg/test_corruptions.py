"""Corruptions: the same bits in any batch, scipy and Pillow as oracles, the draws' statistics, and what is refused."""

import colorsys
import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from ncreg.robustness import corruptions as co
from ncreg.robustness.corruptions._constants import IMAGENET, SMALL, TABLES
from ncreg.robustness.corruptions._random import draws
from ncreg.robustness.intervals import binomial_interval

SEVERITIES = range(1, 6)


def pictures(n=6, height=32, width=32, channels=3, seed=0):
    """Smooth random images of all contrasts on the 8-bit grid, float32."""
    rng = np.random.default_rng(seed)
    blurs = np.linspace(0.4, 4, n)
    x = np.stack([ndimage.gaussian_filter(rng.normal(size=(channels, height, width)), (0, s, s)) for s in blurs])
    x -= x.min((1, 2, 3), keepdims=True)
    x /= x.max((1, 2, 3), keepdims=True)
    return torch.from_numpy(np.round(255 * x) / 255).float()


def numbers(name, severity, n, seed=0):
    """The random numbers that `corrupt` draws, image by image."""
    return [draws(seed, name, severity, torch.tensor([i])) for i in range(n)]


def matches(name, oracle, images, severities=SEVERITIES, tables=TABLES, atol=2e-6):
    """`corrupt` equals oracle(image, constants, draws) of each image, in float64."""
    for table, severity in itertools.product(tables, severities):
        ours = co.corrupt(images, name, severity, constants=table)
        for image, found, rng in zip(images, ours, numbers(name, severity, len(images)), strict=True):
            wanted = oracle(image.double().numpy(), TABLES[table][name][severity - 1], rng)
            np.testing.assert_allclose(found.double(), np.clip(wanted, 0, 1), atol=atol, err_msg=f"{table} {severity}")


# ---- what holds for every type


@pytest.mark.parametrize("name", co.CORRUPTIONS)
@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (28, 28, 1), (9, 33, 3), (65, 12, 3)])
def test_an_image_comes_out_the_same_in_any_batch(name, height, width, channels):
    x = torch.rand(6, channels, height, width, generator=torch.Generator().manual_seed(1))
    before, held = torch.get_rng_state(), x.clone()
    for table, severity in itertools.product(TABLES, (1, 5)):
        whole = co.corrupt(x, name, severity, seed=3, constants=table)
        assert whole.shape == x.shape and whole.dtype == x.dtype and not whole.requires_grad
        assert bool(whole.isfinite().all()) and 0 <= float(whole.min()) and float(whole.max()) <= 1
        again = {"seed": 3, "constants": table}
        alone = torch.cat([co.corrupt(x[i : i + 1], name, severity, first_index=i, **again) for i in range(6)])
        assert torch.equal(whole, alone)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
        assert torch.equal(whole[order], co.corrupt(x[order], name, severity, first_index=order, **again))
    assert torch.equal(x, held) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", co.CORRUPTIONS)
def test_blocks_threads_and_memory_format_play_no_part(name, monkeypatch):
    x = pictures(5, 20, 24).repeat(5, 1, 1, 1)
    held, whole = torch.get_num_threads(), co.corrupt(x, name, 5)
    monkeypatch.setattr(co._corrupt, "_BLOCK", 3 * x[0].numel())
    try:
        torch.set_num_threads(2)
        assert torch.equal(whole, co.corrupt(x.to(memory_format=torch.channels_last), name, 5))
    finally:
        torch.set_num_threads(held)


RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "fog"}
RANDOM |= {"elastic_transform"}


@pytest.mark.parametrize("name", co.CORRUPTIONS)
def test_random_types_follow_seed_and_index_others_do_not(name):
    x = pictures(1).expand(2, -1, -1, -1).contiguous()
    first, second = co.corrupt(x, name, 3)
    other = co.corrupt(x, name, 3, seed=1)[0]
    assert torch.equal(first, second) == torch.equal(first, other) == (name not in RANDOM)
    assert not torch.equal(first, x[0])


# Out of order in the published constants too: two rounds follow three, a smaller blur follows a larger one.
OUT_OF_ORDER = {("small", "glass_blur"), ("small", "elastic_transform"), ("imagenet", "glass_blur")}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", [n for n in co.CORRUPTIONS if n != "saturate"])
def test_severity_moves_images_further_away(name, table):
    if (table, name) in OUT_OF_ORDER:
        pytest.skip("the published severities are not in order of distance")
    x = pictures(60)
    away = [float((co.corrupt(x, name, s, constants=table) - x).square().mean()) for s in SEVERITIES]
    slack = 0.97 if name == "motion_blur" else 1.0  # small constants 3 and 4 share a sigma
    assert all(late > early * slack for early, late in itertools.pairwise(away)), away


@pytest.mark.parametrize("name", [n for n in co.CORRUPTIONS if n != "saturate"])
def test_gray_is_one_channel_of_gray_rgb(name):
    gray = pictures(3, 28, 20, 1)
    for severity in SEVERITIES:
        ours = co.corrupt(gray, name, severity)
        torch.testing.assert_close(
            ours, co.corrupt(gray.expand(-1, 3, -1, -1), name, severity)[:, :1], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", co.CORRUPTIONS)
def test_precisions_agree_and_no_gradient_is_kept(name):
    x = pictures(3, 16, 16)
    single = co.corrupt(x.clone().requires_grad_(), name, 2)
    double = co.corrupt(x.double(), name, 2)
    assert not single.requires_grad and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-4 if name == "elastic_transform" else 1e-5, rtol=0)
    assert co.corrupt(x.to(torch.bfloat16), name, 2).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", co.CORRUPTIONS)
def test_black_and_white_images_are_no_trouble(name, value):
    x = torch.full((2, 3, 12, 9), value)
    for table, severity in itertools.product(TABLES, SEVERITIES):
        assert bool(co.corrupt(x, name, severity, constants=table).isfinite().all())


@pytest.mark.usefixtures("unchecked")
def test_numpys_integers_are_taken():
    x = pictures(2, 8, 8, 1)
    numpys = co.corrupt(x, "fog", np.int64(2), seed=np.int64(3), first_index=np.int64(1))
    assert torch.equal(numpys, co.corrupt(x, "fog", 2, seed=3, first_index=torch.tensor([1, 2], dtype=torch.int32)))


def test_the_table_follows_the_size():
    small, large = pictures(1, 64, 80), pictures(1, 65, 80)
    for x, table in ((small, "small"), (large, "imagenet")):
        assert torch.equal(co.corrupt(x, "contrast", 2), co.corrupt(x, "contrast", 2, constants=table))
    assert set(SMALL) == set(IMAGENET) == set(co.CORRUPTIONS)
    assert all(len(levels) == 5 for table in TABLES.values() for levels in table.values())
    assert {name for names in co.CORRUPTION_GROUPS.values() for name in names} == set(co.CORRUPTIONS)


# ---- one oracle a type


@pytest.mark.parametrize("shape", [(8, 8), (9, 13), (28, 28), (33, 17), (10, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows_to_the_last_bit(shape, channels):
    x = pictures(3, *shape, channels)
    for table, severity in itertools.product(TABLES, SEVERITIES):
        ours = (co.corrupt(x, "jpeg_compression", severity, constants=table) * 255).round().byte()
        for image, found in zip(x, ours, strict=True):
            file = io.BytesIO()
            pixels = (image * 255).round().byte().permute(1, 2, 0).squeeze(2).numpy()
            Image.fromarray(pixels).save(file, "JPEG", quality=TABLES[table]["jpeg_compression"][severity - 1])
            np.testing.assert_array_equal(found.permute(1, 2, 0).squeeze(2), np.asarray(Image.open(file)))


def blurred(x, sigma):
    return ndimage.gaussian_filter(x, (0, sigma, sigma), mode="nearest", truncate=4.0)


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 27, 1)])
def test_gaussian_blur_is_scipys(shape):
    matches("gaussian_blur", lambda x, sigma, rng: blurred(x, sigma), pictures(3, *shape))


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 27, 1)])
def test_defocus_is_scipys_correlation_with_a_smoothed_disk(shape):
    def oracle(x, constants, rng):
        radius, alias = constants
        half, reach = (8, 1) if radius <= 8 else (radius, 2)
        rows, columns = np.mgrid[-half : half + 1, -half : half + 1]
        disk = (rows**2 + columns**2 <= radius**2).astype(float)
        rim = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * alias**2))
        rim = np.outer(rim, rim) / rim.sum() ** 2
        kernel = ndimage.correlate(disk / disk.sum(), rim, mode="mirror")
        return ndimage.correlate(x, kernel[None], mode="mirror")

    matches("defocus_blur", oracle, pictures(3, *shape))


def zoomed(x, factor):
    """The middle of (rows, columns), enlarged by scipy and cut to its size."""
    kept = [int(np.ceil(side / factor)) for side in x.shape]
    top, left = ((side - k) // 2 for side, k in zip(x.shape, kept, strict=True))
    large = ndimage.zoom(x[top : top + kept[0], left : left + kept[1]], factor, order=1)
    top, left = ((grown - side) // 2 for grown, side in zip(large.shape, x.shape, strict=True))
    return large[top : top + x.shape[0], left : left + x.shape[1]]


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 27, 1)])
def test_zoom_blur_is_scipys(shape):
    def oracle(x, factors, rng):
        layers = [np.stack([zoomed(channel, factor) for channel in x]) for factor in factors]
        return (x + sum(layers)) / (len(factors) + 1)

    matches("zoom_blur", oracle, pictures(3, *shape))


def smeared(x, radius, sigma, angle):
    """Shifted copies of (rows, columns) one by one, edges repeated."""
    taps = np.arange(2 * radius + 1)
    weight = np.exp(-(taps**2) / (2 * sigma**2))
    total = np.zeros_like(x)
    for tap, share in zip(taps, weight / weight.sum(), strict=True):
        down = int(np.ceil(tap * np.sin(np.deg2rad(angle)) - 0.5))
        right = int(np.ceil(tap * np.cos(np.deg2rad(angle)) - 0.5))
        rows = np.clip(np.arange(x.shape[0]) + down, 0, x.shape[0] - 1)
        columns = np.clip(np.arange(x.shape[1]) + right, 0, x.shape[1] - 1)
        total += share * x[np.ix_(rows, columns)]
    return total


def angle_of(rng, stream, low, high):
    return low + (high - low) * (int(rng.choice(stream, 1024)) + 0.5) / 1024


def test_motion_blur_by_shifts():
    def oracle(x, constants, rng):
        return np.stack([smeared(channel, *constants, angle_of(rng, 0, -45, 45)) for channel in x])

    matches("motion_blur", oracle, pictures(4, 24, 40))


def test_snow_by_its_steps():
    def oracle(x, constants, rng):
        mean, deviation, zoom, threshold, radius, sigma, kept = constants
        layer = mean + deviation * rng.normal(0, 1, *x.shape[1:])[0, 0].double().numpy()
        layer = zoomed(layer, zoom)
        layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)
        layer = smeared(layer, radius, sigma, angle_of(rng, 1, -135, -45))
        gray = np.tensordot([0.299, 0.587, 0.114], x, 1) if len(x) == 3 else x[0]
        return kept * x + (1 - kept) * np.maximum(x, 1.5 * gray + 0.5) + layer + np.rot90(layer, 2)

    matches("snow", oracle, pictures(3, 32, 32, 3), atol=1e-5)
    matches("snow", oracle, pictures(2, 16, 16, 1), atol=1e-5)


def test_fog_by_loops_over_points():
    def plasma(size, decay, rng):
        heights, step, wibble, stream = np.zeros((size, size)), size, 100.0, 0
        while step >= 2:
            half, places = step // 2, range(0, size, step)
            for kind, (dy, dx) in enumerate(((half, half), (0, half), (half, 0))):
                stream += 1
                noise = rng.uniform(stream, size // step, size // step)[0].double().numpy()
                for (i, y), (j, x) in itertools.product(enumerate(places), enumerate(places)):
                    y0, x0 = y + dy, x + dx
                    around = ((-half, -half), (-half, half), (half, -half), (half, half))
                    if kind:
                        around = ((-half, 0), (half, 0), (0, -half), (0, half))
                    mean = sum(heights[(y0 + a) % size, (x0 + b) % size] for a, b in around) / 4
                    heights[y0, x0] = mean + wibble**2 * (2 * noise[i, j] - 1)
            step, wibble = half, wibble / decay
        heights -= heights.min()
        return heights / heights.max()

    def oracle(x, constants, rng):
        strength, decay = constants
        layer = plasma(32, decay, rng)[: x.shape[1], : x.shape[2]]
        return (x + strength * layer) * x.max() / (x.max() + strength)

    matches("fog", oracle, pictures(2, 28, 20, 1), severities=(1, 5), atol=1e-5)
    matches("fog", oracle, pictures(1, 17, 32, 3), severities=(3,), atol=1e-5)


def test_glass_blur_by_the_original_loop():
    def oracle(x, constants, rng):
        sigma, reach, rounds = constants
        x = blurred(x, sigma)
        height, width = x.shape[1:]
        for turn in range(rounds):
            shift = (rng.uniform(turn, 2, height, width)[0] * 2 * reach).floor().long().numpy() - reach
            for h, w in itertools.product(range(height - reach, reach, -1), range(width - reach, reach, -1)):
                right, down = shift[:, h, w]
                x[:, h, w] = x[:, h + down, w + right]  # what the swap of two numpy views comes to
        return blurred(x, sigma)

    matches("glass_blur", oracle, pictures(3, 14, 19))
    matches("glass_blur", oracle, pictures(2, 8, 8, 1))


def test_elastic_transform_by_scipy_and_a_linear_system():
    def displaced(x, rows, columns, mode):
        return np.stack([ndimage.map_coordinates(channel, [rows, columns], order=1, mode=mode) for channel in x])

    def oracle(x, constants, rng):
        height, width = x.shape[1:]
        side = min(height, width)
        strength, sigma, spread = (side * c for c in constants)
        rows, columns = np.mgrid[:height, :width].astype(float)
        if spread:
            arm, middle = side // 3, np.array([width // 2, height // 2])
            fixed = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])  # (x, y)
            moved = fixed + spread * (2 * rng.uniform(0, 3, 2)[0].double().numpy() - 1)
            # The affine map that takes the moved points to the fixed ones says where a pixel comes from.
            matrix = np.linalg.solve(np.c_[moved, np.ones(3)], fixed)
            back = np.stack([columns, rows, np.ones_like(rows)], -1) @ matrix
            x = displaced(x, back[..., 1], back[..., 0], "mirror")
        if not strength:
            return x
        noise = 2 * rng.uniform(1, 2, height, width)[0].double().numpy() - 1
        down, right = (strength * ndimage.gaussian_filter(n, sigma, mode="reflect", truncate=3.0) for n in noise)
        return displaced(x, rows + down, columns + right, "reflect")

    matches("elastic_transform", oracle, pictures(3, 32, 32), atol=1e-4)
    matches("elastic_transform", oracle, pictures(2, 12, 29, 1), atol=1e-4)


def test_pixelate_is_pillows_box():
    def oracle(x, size, rng):
        height, width = x.shape[1:]
        planes = [Image.fromarray(channel.astype(np.float32)) for channel in x]
        coarse = [plane.resize((int(width * size), int(height * size)), Image.Resampling.BOX) for plane in planes]
        return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BOX)) for plane in coarse])

    matches("pixelate", oracle, pictures(3, 32, 32))
    matches("pixelate", oracle, pictures(2, 28, 51, 1))


def by_pixel(change):
    """An oracle that changes the hue, saturation and value of every pixel."""

    def oracle(x, constants, rng):
        flat = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel), constants)) for pixel in x.reshape(3, -1).T]
        return np.array(flat).T.reshape(x.shape)

    return oracle


def test_brightness_and_saturation_by_colorsys():
    x = pictures(2, 9, 10)
    x[0, :, 0] = torch.linspace(0, 1, 10)  # gray pixels, black and white ones
    matches("brightness", by_pixel(lambda h, s, v, c: (h, s, min(v + c, 1))), x)
    matches("saturate", by_pixel(lambda h, s, v, c: (h, min(max(s * c[0] + c[1], 0), 1), v)), x, atol=1e-5)
    gray = pictures(2, 9, 10, 1)
    matches("brightness", lambda x, c, rng: x + c, gray)
    assert torch.equal(co.corrupt(gray, "saturate", 5), gray)


def test_contrast_by_numpy():
    def oracle(x, kept, rng):
        mean = x.mean((1, 2), keepdims=True)
        return mean + kept * (x - mean)

    matches("contrast", oracle, pictures(3, 28, 13))


# ---- the draws


def test_normal_and_uniform_draws_pass_kolmogorov_and_smirnov():
    rng = draws(5, "gaussian_noise", 1, torch.arange(400))
    normal, uniform = rng.normal(0, 500).double(), rng.uniform(1, 500).double()
    assert stats.kstest(normal.flatten(), "norm").pvalue > 1e-3
    assert stats.kstest(uniform.flatten(), "uniform").pvalue > 1e-3
    assert 0 <= float(uniform.min()) and float(uniform.max()) < 1
    assert float(normal.var()) == pytest.approx(1, abs=0.015)
    # Streams, images and neighbours are uncorrelated: 5 standard errors of n = 200,000.
    limit = 5 / 200_000**0.5
    again = rng.normal(1, 500).double()
    assert abs(float((normal * again).mean())) < limit
    assert abs(float((normal[1:] * normal[:-1]).mean())) < limit
    assert abs(float((normal[:, 1:] * normal[:, :-1]).mean())) < limit
    assert abs(float((uniform.mean(1) - 0.5).std() * 500**0.5 - 12**-0.5)) < 0.03


def test_every_part_of_the_key_counts():
    base = ("fog", 1, torch.tensor([7]))
    keys = {int(draws(seed, *base).keys) for seed in (0, 1, -1, 2**63, 10**30)}
    keys |= {int(draws(0, name, 1, torch.tensor([7])).keys) for name in co.CORRUPTIONS}
    keys |= {int(draws(0, "fog", s, torch.tensor([7])).keys) for s in SEVERITIES}
    keys |= set(draws(0, "fog", 1, torch.arange(-1000, 1000)).keys.tolist())
    # fog at severity 1 of index 7 and seed 0 comes up in all four; a seed beyond 64 bits wraps around.
    assert len(keys) == 5 + (len(co.CORRUPTIONS) - 1) + 4 + 1999


@pytest.mark.parametrize(
    ("value", "severity", "table"), [(0.5, 1, "small"), (1.0, 5, "small"), (77 / 255, 3, "imagenet")]
)
@pytest.mark.parametrize("off_grid", [0.0, 0.4 / 255])
def test_shot_noise_is_poisson(value, severity, table, off_grid):
    value = max(value - off_grid, 0)
    photons = TABLES[table]["shot_noise"][severity - 1]
    images = torch.full((60, 1, 40, 40), value)
    count = (co.corrupt(images, "shot_noise", severity, constants=table).double() * photons).round().flatten()
    rate = np.round(value * 65280) / 65280 * photons
    top = int(stats.poisson.ppf(0.999, rate)) if photons > rate + 5 * rate**0.5 else photons - 1
    edges = np.unique(np.linspace(stats.poisson.ppf(0.001, rate), top, 12).astype(int))
    seen = np.histogram(count, np.r_[-1, edges, 1e9] + 0.5)[0]
    wanted = len(count) * np.diff(np.r_[0, stats.poisson.cdf(edges, rate), 1])
    assert stats.chisquare(seen, wanted).pvalue > 1e-3


def test_gaussian_speckle_and_impulse_noise_have_their_size():
    x = torch.full((40, 3, 32, 32), 0.4)
    for severity, table in itertools.product((1, 5), TABLES):
        c = TABLES[table]
        noise = (co.corrupt(x.double(), "gaussian_noise", severity, constants="small") - 0.4).std()
        assert float(noise) == pytest.approx(c["gaussian_noise"][severity - 1], rel=0.01) or table == "imagenet"
        noise = (co.corrupt(x, "speckle_noise", severity, constants="small") - 0.4).std() / 0.4
        assert float(noise) == pytest.approx(c["speckle_noise"][severity - 1], rel=0.01) or table == "imagenet"
        hit = co.corrupt(x, "impulse_noise", severity, constants=table)
        for end in (0.0, 1.0):
            share = float((hit == end).double().mean())
            assert share == pytest.approx(c["impulse_noise"][severity - 1] / 2, rel=0.06)
        assert bool(((hit == 0.4) | (hit == 0) | (hit == 1)).all())


# ---- agreement with the numpy package that others use

TIGHT = {"defocus_blur", "zoom_blur", "brightness", "contrast", "jpeg_compression", "gaussian_blur", "saturate"}
TIGHT |= {"pixelate"}


@pytest.mark.parametrize("name", [n for n in co.CORRUPTIONS if n != "glass_blur"])  # its compiler takes half a minute
def test_agreement_with_imagecorruptions(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("imagecorruptions", exc_type=ImportError).corrupt  # its OpenCV needs libxcb
    x = pictures(60)
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for severity in (1, 3, 5):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.random.seed(severity)
            other = np.stack([theirs(image, severity, name) for image in pixels]) / 255
        ours = co.corrupt(x, name, severity, constants="imagenet").permute(0, 2, 3, 1).double().numpy()
        ours = np.floor(ours * 255 + 1e-3) / 255  # theirs ends in 8 bits, cut off
        ours_effect, effect = ours - pixels / 255, other - pixels / 255
        if name in TIGHT:
            assert 10 * np.log10(1 / max(((ours - other) ** 2).mean(), 1e-12)) > 48
            assert np.corrcoef(ours_effect.ravel(), effect.ravel())[0, 1] > 0.999
        # One map of fog, or one fall of snow, moves a whole image: 60 images leave that much to chance.
        assert ours_effect.mean() == pytest.approx(effect.mean(), abs=0.06 if name in ("fog", "snow") else 0.01)
        assert ours_effect.std() == pytest.approx(effect.std(), rel=0.1 if name in ("fog", "snow") else 0.05)


# ---- accuracy under corruption


def brightest_half(x):
    """Two logits: is the left or the right half brighter."""
    half = x.shape[-1] // 2
    return 10 * torch.stack([x[..., :half].mean((1, 2, 3)), x[..., half:].mean((1, 2, 3))], 1) - 1


def test_accuracy_is_that_of_corrupting_and_counting():
    x = pictures(50, 12, 12, 1)
    target = brightest_half(x).argmax(1)
    report = co.corruption_accuracy(brightest_half, x, target, names=["fog", "snow"], severities=[5, 2], seed=4)
    assert report.clean_accuracy == 1 and report.samples == 50
    assert report.names == ("fog", "snow") and report.severities == (5, 2)
    for (row, name), (column, severity) in itertools.product(enumerate(report.names), enumerate(report.severities)):
        right = int((brightest_half(co.corrupt(x, name, severity, seed=4)).argmax(1) == target).sum())
        assert float(report.accuracy[row, column]) == right / 50
        ends = (float(report.low[row, column]), float(report.high[row, column]))
        assert ends == pytest.approx(binomial_interval(right, 50))
    assert report.mean_accuracy == pytest.approx(float(report.accuracy.mean())) and report.mean_accuracy < 1
    again = co.corruption_accuracy(
        brightest_half, x, target, names=["fog", "snow"], severities=[5, 2], seed=4, batch_size=7
    )
    assert torch.equal(report.accuracy, again.accuracy)


def test_default_types_are_the_benchmarks_but_frost():
    x = pictures(4, 8, 8, 1)
    report = co.corruption_accuracy(brightest_half, x, torch.tensor([0, 1, 0, 1]))
    assert len(report.names) == 14 and report.severities == (1, 2, 3, 4, 5)
    assert not set(report.names) & set(co.CORRUPTION_GROUPS["extra"])


def test_mean_corruption_error_by_hand():
    def report(error, names=("fog", "snow")):
        accuracy = 1 - torch.tensor(error, dtype=torch.float64)
        return co.CorruptionReport(names, (1, 2), 10, 1.0, accuracy, accuracy, accuracy, float(accuracy.mean()))

    own, base = report([[0.1, 0.2], [0.5, 0.7]]), report([[0.2, 0.4], [0.4, 0.6]])
    assert co.mean_corruption_error(own, base) == pytest.approx((0.3 / 0.6 + 1.2 / 1.0) / 2)
    assert co.mean_corruption_error(base, base) == pytest.approx(1)
    with pytest.raises(ValueError, match="makes no error on fog"):
        co.mean_corruption_error(own, report([[0.0, 0.0], [0.4, 0.6]]))
    with pytest.raises(ValueError, match="differ in names"):
        co.mean_corruption_error(own, report([[0.2, 0.4], [0.4, 0.6]], ("fog", "contrast")))


# ---- what is refused


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.ones(2, 1, 8, 8) * 255}, ValueError, "normalise inside the model"),
        ({"images": torch.ones(2, 1, 8, 8) - 2}, ValueError, r"lie in \[0, 1\]"),
        ({"images": torch.ones(2, 1, 8, 8) * torch.nan}, ValueError, "finite"),
        ({"images": torch.ones(2, 1, 8, 8).byte()}, TypeError, "images.float"),
        ({"images": torch.ones(2, 8, 8)}, ValueError, "channels"),
        ({"images": torch.ones(0, 1, 8, 8)}, ValueError, "empty"),
        ({"images": torch.ones(2, 4, 8, 8)}, ValueError, "4 channels"),
        ({"images": torch.ones(2, 1, 7, 8)}, ValueError, "7x8 pixels"),
        ({"name": "rain"}, ValueError, "gaussian_noise, shot_noise"),
        ({"name": "frost"}, ValueError, "photographs"),
        ({"severity": 0}, ValueError, "severity=0 must be in 1..5"),
        ({"severity": 6}, ValueError, "severity=6"),
        ({"severity": 2.5}, TypeError, "severity"),
        ({"severity": True}, TypeError, "severity"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"constants": "cifar"}, ValueError, "'small', 'imagenet'"),
        ({"first_index": torch.arange(3)}, ValueError, "first_index"),
        ({"first_index": torch.rand(2)}, TypeError, "first_index"),
        ({"first_index": "0"}, TypeError, "first_index"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    good = {"images": torch.ones(2, 1, 8, 8), "name": "fog", "severity": 1}
    co.corrupt(**good)
    given = good | change
    with pytest.raises(error, match=message):
        co.corrupt(given.pop("images"), given.pop("name"), given.pop("severity"), **given)


@pytest.mark.usefixtures("unchecked")
def test_bad_evaluations_are_refused():
    x, y = pictures(4, 8, 8, 1), torch.tensor([0, 1, 0, 1])
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 2))
    for keywords, error, message in (
        ({"names": ["fog", "fog"]}, ValueError, "twice"),
        ({"names": []}, ValueError, "names is empty"),
        ({"names": "fog"}, TypeError, "must be a list"),
        ({"severities": 3}, TypeError, r"severities must be a list, got 3: \[3\]"),
        ({"names": ["mist"]}, ValueError, "no corruption"),
        ({"severities": [0]}, ValueError, "severity=0"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ):
        with pytest.raises(error, match=message):
            co.corruption_accuracy(brightest_half, x, y, **keywords)
    with pytest.raises(ValueError, match="eval"):
        co.corruption_accuracy(module, x, y)
    with pytest.raises(ValueError, match="probabilities"):
        co.corruption_accuracy(lambda x: brightest_half(x).softmax(1), x, y)
    with pytest.raises(ValueError, match="target"):
        co.corruption_accuracy(brightest_half, x, y + 1)
    with pytest.raises(ValueError, match="normalise"):
        co.corruption_accuracy(brightest_half, 2 * x - 1, y)
