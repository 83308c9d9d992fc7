"""Photographs, crops and cached latents: what is read, what is refused, what is held out."""

import numpy as np
import pytest
from latent_diffusion import crops, latents, photographs
from latent_diffusion.errors import Skipped, UserError
from PIL import Image


def photograph(height=60, width=90, name="photo", seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return photographs.Photograph(name, pixels)


def save_image(folder, name, height=40, width=50):
  path = folder / name
  Image.fromarray(photograph(height, width).pixels).save(path)
  return path


def save_latents(path, channels=4, side=8, key="latents_8x8", value=None, seed=0):
  array = np.random.default_rng(seed).normal(size=(channels, side, side)).astype(np.float32)
  np.savez(path, **{key: array if value is None else np.full_like(array, value)})


def test_bundled_photographs_are_there_and_are_photographs():
  found = photographs.load(None, Skipped())
  assert len({photo.name for photo in found}) == len(found) >= 6
  assert all(photo.pixels.ndim == 3 and photo.pixels.dtype == np.uint8 for photo in found)
  assert all(photo.pixels.std() > 15 for photo in found)


def test_a_truncated_image_is_skipped_and_named(tmp_path):
  save_image(tmp_path, "good.png")
  path = save_image(tmp_path, "broken.jpg", 200, 200)
  path.write_bytes(path.read_bytes()[:-3000])
  (tmp_path / "text.png").write_text("no image")
  (tmp_path / "notes.txt").write_text("not looked at")
  skipped = Skipped()
  assert [photo.name for photo in photographs.load(tmp_path, skipped)] == ["good"]
  assert set(skipped.reasons) == {"broken.jpg", "text.png"}
  assert skipped.lines()[0] == "Skipped 2 files:"
  assert "truncated" in skipped.reasons["broken.jpg"]


def test_modes_that_are_not_rgb_are_read(tmp_path):
  Image.new("RGBA", (20, 30), (1, 2, 3, 4)).save(tmp_path / "alpha.png")
  Image.new("L", (20, 30), 7).save(tmp_path / "grey.webp")
  Image.new("P", (20, 30)).save(tmp_path / "palette.gif")
  Image.new("CMYK", (20, 30)).save(tmp_path / "print.jpg")
  found = photographs.load(tmp_path, Skipped())
  assert [photo.pixels.shape for photo in found] == [(30, 20, 3)] * 4


def test_photographs_are_turned_as_the_camera_was_held(tmp_path):
  image = Image.new("RGB", (40, 20))
  exif = image.getexif()
  exif[0x0112] = 6
  image.save(tmp_path / "turned.jpg", exif=exif)
  assert photographs.load(tmp_path, Skipped())[0].pixels.shape == (40, 20, 3)


def test_empty_and_missing_folders_are_errors(tmp_path):
  with pytest.raises(UserError, match="no usable image"):
    photographs.load(tmp_path, Skipped())
  with pytest.raises(UserError, match="not a folder"):
    photographs.load(tmp_path / "missing", Skipped())
  with pytest.raises(UserError, match="0 usable"):
    latents.read_folder(tmp_path, Skipped())


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (64, 64), (40, 400)])
def test_training_and_held_out_crops_share_no_pixel(height, width):
  train, held_out = crops.cut(photograph(height, width), (30, 30), 32, False, 0)
  assert max(crop.box[2] for crop in train) <= min(crop.box[0] for crop in held_out)
  for crop in train + held_out:
    left, top, right, bottom = crop.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 1.0), (1.5, 1.5), (0.5, 0.5625)])
def test_crops_take_the_bucket_that_is_nearest(ratio, expected):
  height, width = crops.nearest_bucket(1000, int(1000 * ratio), 192, False)
  assert width / height == pytest.approx(expected, rel=0.05)
  assert height * width == pytest.approx(192**2, rel=0.1)


def test_buckets_are_multiples_of_what_the_model_needs():
  for resolution in (24, 48, 64, 100):
    assert all(side % crops.MULTIPLE == 0 for pair in crops.buckets(resolution) for side in pair)


def test_latents_survive_the_npz_layout(tmp_path):
  rng = np.random.default_rng(0)
  plain, flipped = rng.normal(size=(2, 4, 6, 3)).astype(np.float32)
  latents.write(tmp_path / "a.npz", plain, flipped, (90, 60), (1, 2, 3, 4))
  with np.load(tmp_path / "a.npz") as file:
    assert set(file.files) == {
      "latents_4x6", "latents_flipped_4x6", "original_size_4x6", "crop_ltrb_4x6"}
    assert file["latents_4x6"].shape == (3, 4, 6)
    assert file["original_size_4x6"].tolist() == [90, 60]
  read = latents.read(tmp_path / "a.npz")
  np.testing.assert_array_equal(read[0], plain)
  np.testing.assert_array_equal(read[1], flipped)


def test_both_key_styles_and_mixed_shapes_are_bucketed(tmp_path):
  for i in range(10):
    save_latents(tmp_path / f"new{i}.npz", seed=i)
    save_latents(tmp_path / f"old{i}.npz", side=6, key="latents", seed=i)
  base, subject = latents.read_folder(tmp_path, Skipped())
  assert set(base.train) == {(8, 8, 4), (6, 6, 4)}
  count = sum(len(x) for split in (base, subject) for part in split for x in part.values())
  assert count == 20
  rows = np.concatenate([x.reshape(-1, 4) for x in base.train.values()])
  np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(rows.std(0), 1, atol=1e-5)


def test_useless_latents_are_skipped_and_named(tmp_path):
  for i in range(6):
    save_latents(tmp_path / f"good{i}.npz")
  save_latents(tmp_path / "channels.npz", channels=16)
  save_latents(tmp_path / "nan.npz", value=np.nan)
  save_latents(tmp_path / "odd.npz", side=7, key="latents")
  np.savez(tmp_path / "nothing.npz", alpha_mask=np.ones(3))
  (tmp_path / "broken.npz").write_bytes((tmp_path / "good0.npz").read_bytes()[:100])
  skipped = Skipped()
  latents.read_folder(tmp_path, skipped)
  assert set(skipped.reasons) == {
    "channels.npz", "nan.npz", "odd.npz", "nothing.npz", "broken.npz"}
  assert skipped.reasons["channels.npz"] == "16 channels where the others have 4"
  assert skipped.reasons["nothing.npz"] == "holds no latents"


def test_batches_depend_on_seed_and_step_alone():
  rng = np.random.default_rng(0)
  stacks = {(2, 2, 1): rng.normal(size=(5, 2, 2, 1)), (4, 2, 1): rng.normal(size=(9, 4, 2, 1))}
  first = [latents.batch(stacks, 3, 0, step) for step in range(20)]
  again = [latents.batch(stacks, 3, 0, step) for step in range(20)]
  assert all((a == b).all() for a, b in zip(first, again))
  assert {x.shape for x in first} == {(3, 2, 2, 1), (3, 4, 2, 1)}
  assert any(x.shape != y.shape or (x != y).any() for x, y in zip(
    first, [latents.batch(stacks, 3, 1, step) for step in range(20)]))
