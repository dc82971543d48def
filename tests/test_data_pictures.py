import numpy as np
import pytest
from PIL import Image

from fedtorch import ConfigError
from fedtorch.data.pictures import Frame, as_array, looks, read

GREY = (np.arange(12).reshape(3, 4) * 20).astype(np.uint8)


def saved(folder, image, name="a.png", **how):
    path = str(folder / name)
    image.save(path, **how)
    return path


def test_grey_of_eight_and_sixteen_bits_keeps_its_numbers(tmp_path):
    eight = saved(tmp_path, Image.fromarray(GREY))
    assert np.array_equal(read(eight, Frame(1, 3, 4))[0], GREY)
    assert np.array_equal(read(eight, Frame(3, 3, 4)), np.stack([GREY] * 3))
    deep = saved(tmp_path, Image.fromarray(GREY.astype(np.uint16) * 257), "deep.png")
    assert read(deep, Frame(1, 3, 4)).dtype == np.uint16
    assert np.array_equal(read(deep, Frame(1, 3, 4))[0], GREY.astype(np.uint16) * 257)
    assert [tuple(k) for k in looks([eight, deep])] == [
        (3, 4, False, False, ""),
        (3, 4, False, True, ""),
    ]
    bits = saved(tmp_path, Image.fromarray(GREY > 100), "bits.png")
    assert np.array_equal(read(bits, Frame(1, 3, 4))[0], 255 * (GREY > 100))
    with pytest.raises(
        ConfigError, match=r"kind 'I;16', .*it is grey, and the model takes colours"
    ):
        read(deep, Frame(3, 3, 4))
    real = saved(tmp_path, Image.fromarray(GREY.astype(np.float32)), "real.tif")
    with pytest.raises(ConfigError, match=r"real\.tif is an image of kind 'F'"):
        read(real, Frame(1, 3, 4))
    for odd in (-1, 65536):
        beyond = saved(tmp_path, Image.fromarray(np.full((3, 4), odd, np.int32)), "beyond.tif")
        with pytest.raises(ConfigError, match="goes beyond 16 bits"):
            read(beyond, Frame(1, 3, 4))


def test_a_palette_is_its_colours_and_grey_where_they_are(tmp_path):
    colours = np.zeros((3, 4, 3), np.uint8)
    colours[..., 0], colours[1, 1] = 200, (10, 20, 30)
    coloured = saved(tmp_path, Image.fromarray(colours).quantize(4))
    assert np.array_equal(read(coloured, Frame(3, 3, 4)), colours.transpose(2, 0, 1))
    few = (GREY > 100).astype(np.uint8) * 90 + 9
    grey = saved(tmp_path, Image.fromarray(few).convert("P"), "grey.png")
    with Image.open(grey) as image:
        assert image.mode == "P"
    assert np.array_equal(read(grey, Frame(1, 3, 4))[0], few)
    first, second = looks([coloured, grey])
    assert (first.colour, first.note, second.colour, second.note) == (
        True,
        "P is read as colours",
        False,
        "",
    )


def test_what_is_see_through_needs_a_background(tmp_path):
    full = Image.new("RGBA", (4, 3), (10, 20, 30, 255))
    assert read(saved(tmp_path, full), Frame(3, 3, 4))[:, 0, 0].tolist() == [10, 20, 30]
    full.putpixel((1, 0), (10, 20, 30, 0))
    path = saved(tmp_path, full)
    with pytest.raises(ConfigError, match=r"see-through in places: flatten") as said:
        read(path, Frame(3, 3, 4))
    assert str(said.value).count(str(path)) == 1
    white = read(path, Frame(3, 3, 4, background="white"))
    assert white[:, 0, :2].T.tolist() == [[10, 20, 30], [255, 255, 255]]
    with pytest.raises(ConfigError, match=r"unknown color"):
        read(path, Frame(3, 3, 4, background="nocolour"))
    key = saved(tmp_path, Image.fromarray(GREY), "key.png", transparency=20)
    with pytest.raises(ConfigError, match=r"see-through"):
        read(key, Frame(1, 3, 4))
    grey = Image.fromarray(GREY).convert("LA")
    assert np.array_equal(read(saved(tmp_path, grey), Frame(1, 3, 4))[0], GREY)


def test_the_middle_is_cut_out_after_the_shorter_side_is_resized(tmp_path):
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 15:25] = 200
    path = saved(tmp_path, Image.fromarray(wide))
    assert (read(path, Frame(1, 10, 10, resize=10)) == 200).all()
    half = read(path, Frame(1, 5, 5, resize=5))
    assert half.shape == (1, 5, 5) and (half[0, :, 1:4] > 190).all()
    assert read(path, Frame(1, 4, 4, resize=8)).shape == (1, 4, 4)
    odd = saved(tmp_path, Image.fromarray(np.zeros((7, 13), np.uint8)), "odd.png")
    assert read(odd, Frame(3, 9, 9, resize=9)).shape == (3, 9, 9)
    assert read(path, Frame(1, 6, 8)).shape == (1, 6, 8)  # stretched
    deep = saved(tmp_path, Image.fromarray(wide.astype(np.uint16) * 300), "deep.png")
    assert read(deep, Frame(1, 10, 10, resize=10)).max() == 60000


def test_a_photograph_is_turned_upright_and_read_small(tmp_path):
    tall = Image.new("RGB", (60, 40), (200, 0, 0))
    tall.paste((0, 0, 200), (0, 0, 30, 40))
    exif = Image.Exif()
    exif[274] = 6  # to be turned a quarter to the right
    path = saved(tmp_path, tall, "a.jpg", exif=exif, quality=95)
    (seen,) = looks([path])
    assert (seen.rows, seen.columns, seen.note) == (60, 40, "turned upright by its EXIF tag")
    array = read(path, Frame(3, 60, 40))
    assert array[0, 5].min() < 50 < array[2, 5].min() and array[0, 55].min() > 150
    small = read(path, Frame(3, 8, 8, resize=8))  # decoded at a fraction of its size
    assert small.shape == (3, 8, 8) and small[2, 0].min() > 100 > small[2, 7].max()
    cmyk = saved(tmp_path, tall.convert("CMYK"), "c.jpg")
    assert looks([cmyk])[0].note == "CMYK is read as colours"
    assert abs(int(read(cmyk, Frame(3, 40, 60))[0, 20, 50]) - 200) < 30


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_damaged_files_are_named(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    with open(path, "rb") as file:
        raw = file.read()
    for cut in (0, 20, len(raw) // 2):
        with open(path, "wb") as file:
            file.write(raw[:cut])
        with pytest.raises(ConfigError, match=f"{name} (is damaged|cannot be read as a picture)"):
            looks([path])
            read(path, Frame(1, 40, 40))
    frames = [Image.fromarray(noise), Image.fromarray(noise.T)]
    several = saved(tmp_path, frames[0], "b.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(ConfigError, match=r"b\.tif holds 2 pictures"):
        looks([several])


def test_pictures_that_are_open_already_are_read_by_their_colours():
    assert np.array_equal(as_array(Image.fromarray(GREY)), GREY)
    assert as_array(Image.fromarray(GREY.astype(np.uint16))).dtype == np.uint16
