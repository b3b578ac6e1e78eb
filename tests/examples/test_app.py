"""The app: its parts, and the page in a headless Chromium that reaches nothing but this machine."""

from __future__ import annotations

import io
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

gr = pytest.importorskip("gradio")
import app  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from diffusers_bitsfusion import size_report  # noqa: E402
from diffusers_bitsfusion.app import models, sampling  # noqa: E402
from diffusers_bitsfusion.app import page as page_of_the_app  # noqa: E402
from diffusers_bitsfusion.cli import app as cli  # noqa: E402

ARGUMENTS = {"prompt": "a red circle", "negative_prompt": "", "num_inference_steps": 10, "guidance_scale": 7.5}
STEPS = 11  # of the PNDM scheduler, which repeats its second
TIMEOUT = 120_000  # milliseconds, for busy machines
MB = 1e6


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def sample_directly(folder, seed: int) -> np.ndarray:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    return pixels(pipe(**ARGUMENTS, generator=torch.Generator().manual_seed(seed)).images[0])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 20 * np.log10(255) - 10 * np.log10(np.mean((a - b) ** 2.0))


def test_samples_what_the_pipeline_samples_and_reports_each_step(source_folder):
    seen = []
    pipe = models.load(source_folder)
    first, seconds = sampling.sample(pipe, 5, lambda *step: seen.append(step), **ARGUMENTS)
    second, _ = sampling.sample(pipe, 5, lambda *step: None, **ARGUMENTS)
    other, _ = sampling.sample(pipe, 6, lambda *step: None, **ARGUMENTS)
    assert np.array_equal(pixels(first), sample_directly(source_folder, 5)) and seconds > 0
    assert seen == [(step, STEPS) for step in range(1, STEPS + 1)]
    picture, value = sampling.difference(first, second)
    assert not pixels(picture).any() and value == np.inf
    assert sampling.difference(first, other)[1] < np.inf


def test_difference():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 8, 12, 3), np.uint8)
    picture, value = sampling.difference(Image.fromarray(a), Image.fromarray(b))
    assert np.array_equal(pixels(picture), abs(a.astype(int) - b))
    assert value == pytest.approx(psnr(a.astype(int), b.astype(int)))
    with pytest.raises(ValueError, match=r"12, 8.*6, 8.*cannot be compared"):
        sampling.difference(Image.fromarray(a), Image.fromarray(b[:, :6]))


def test_quantizes_the_pipeline_of_the_demo_when_nothing_is_named(monkeypatch):
    seen = {}

    def build_app(full, quantized, examples):
        seen["files"] = {path: (path / "model_index.json").is_file() for path in (full, quantized)}
        seen["report"] = size_report(quantized / "unet")
        return gr.Blocks()

    monkeypatch.setattr("sys.argv", ["app.py", "--target-bits", "2.8"])
    monkeypatch.setattr(app, "build_app", build_app)
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **arguments: seen.update(arguments))
    app.main()
    assert list(seen["files"].values()) == [True, True]
    assert seen["report"].average_bits.paper == pytest.approx(2.8, abs=0.01)
    assert seen["show_error"] and seen["server_port"] is None and "server_name" not in seen


def test_environment_gives_the_pipelines_of_a_space(monkeypatch, source_folder, packed_folders):
    monkeypatch.setattr("sys.argv", ["app.py"])
    monkeypatch.setenv("APP_PIPELINE", str(source_folder))
    monkeypatch.setenv("APP_QUANTIZED", str(packed_folders["table"]))
    folders = []
    monkeypatch.setattr(app, "build_app", lambda *paths, examples: folders.extend(paths) or gr.Blocks())
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **arguments: None)
    app.main()
    assert folders == [source_folder, packed_folders["table"]]


def test_the_trained_unet_is_what_the_shapes_pipeline_is_shown_beside(monkeypatch):
    shown = []
    monkeypatch.setattr("sys.argv", ["app.py"])
    monkeypatch.setattr(app, "build_app", lambda *paths, examples: shown.append((paths, examples)) or gr.Blocks())
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **arguments: None)
    app.main()
    (((full, trained), examples),) = shown
    assert (full.name, trained.name) == ("pipeline", "unet-2bit") and "three green hearts" in examples
    packed = models.load_quantized(trained, full)
    assert packed.pipeline.unet.is_quantized and packed.pipeline.vae.dtype == torch.float32
    assert packed.label == "trained, 2.03 bits (unet-2bit)"


def test_several_quantized_models_to_choose_from(source_folder, packed_folders):
    folders = (packed_folders["keep"], packed_folders["table"] / "unet")
    comparison = page_of_the_app.Comparison(
        source_folder, models.load(source_folder), [models.load_quantized(folder, source_folder) for folder in folders]
    )
    assert [label.split(",")[0] for label in comparison.quantized] == ["rounded", "rounded"]
    for label, folder in zip(comparison.quantized, folders, strict=True):
        *_, (first, second, apart, figures) = comparison.generate(
            label, ARGUMENTS["prompt"], "", 5, 2, 7.5, lambda *a, **k: None
        )
        expected = StableDiffusionPipeline.from_pretrained(source_folder)
        if folder.name == "unet":
            expected.unet = type(expected.unet).from_pretrained(folder)
        else:
            expected = StableDiffusionPipeline.from_pretrained(folder)
        arguments = ARGUMENTS | {"num_inference_steps": 2}
        sampled = expected(**arguments, generator=torch.Generator().manual_seed(5)).images[0]
        assert np.array_equal(pixels(second), pixels(sampled))
        assert np.array_equal(pixels(apart), abs(pixels(first) - pixels(second)))
        assert "times smaller" in figures and "dB" in figures


def test_warming_up_is_one_step_and_changes_no_image(source_folder, monkeypatch):
    pipe, calls = models.load(source_folder), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    sampling.warm_up(pipe, **ARGUMENTS)
    assert len(calls) == 1
    image, _ = sampling.sample(pipe, 5, lambda *step: None, **ARGUMENTS)
    assert np.array_equal(pixels(image), sample_directly(source_folder, 5))


def test_refuses_a_quantized_pipeline_as_full_precision(packed_folders, source_folder):
    for quantized in ([], ["--quantized", packed_folders["keep"]]):
        result = CliRunner().invoke(cli, ["app", *map(str, [packed_folders["keep"], *quantized])])
        assert result.exit_code == 1 and "is quantized already" in result.stderr
    both = ("--quantized", packed_folders["keep"], "--target-bits", 2.6)
    assert CliRunner().invoke(cli, ["app", str(source_folder), *map(str, both)]).exit_code == 2
    with pytest.raises(ValueError, match="is quantized already"):
        app.build_app(packed_folders["keep"], packed_folders["table"])


def test_refuses_an_unquantized_pipeline_as_quantized(source_folder, monkeypatch):
    with pytest.raises(ValueError, match="not quantized by diffusers_bitsfusion"):
        app.build_app(source_folder, source_folder)
    monkeypatch.setattr("sys.argv", ["app.py", "--pipeline", str(source_folder), "--quantized", str(source_folder)])
    with pytest.raises(SystemExit, match=r"^Error: .*not quantized by diffusers_bitsfusion"):
        app.main()


@pytest.fixture(scope="module")
def address(source_folder, packed_folders, tmp_path_factory):
    """Of the app, serving in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        blocks = app.build_app(source_folder, packed_folders["cache"])
        _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
        yield address
        blocks.close()


@pytest.fixture(scope="module")
def browser(address):
    """After `address`: Gradio must not start inside Playwright's event loop."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("No Chromium on PATH: apt-get install -y --no-install-recommends chromium")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", offline])
        yield browser
        browser.close()


@pytest.fixture
def page(address, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(TIMEOUT)
    page.urls = []
    page.on("request", lambda request: page.urls.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    page.close()


def ask(page, steps: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(ARGUMENTS["prompt"])
    page.get_by_label("Seed").fill("5")
    page.get_by_label("number input for Steps").fill(str(steps))
    page.get_by_role("button", name="Generate").click()


def served(page, number: int) -> np.ndarray:
    """The pixels behind the picture of that number, once it shows."""
    image = page.locator(".picture").nth(number).locator("img")
    image.wait_for()
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    return pixels(Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())))


def figures(page) -> dict[str, list[str]]:
    rows = [row.split("\t") for row in page.locator(".figures table").inner_text().splitlines() if row.strip()]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def test_samples_both_images_with_progress_sizes_and_times(page, monkeypatch, source_folder, packed_folders):
    sample, resume = sampling.sample, threading.Semaphore(0)

    def pausing_sample(pipe, seed, on_step, **arguments):
        def pausing(step, number):
            on_step(step, number)
            if step == 3:
                resume.acquire(timeout=TIMEOUT / 1000)

        return sample(pipe, seed, pausing, **arguments)

    monkeypatch.setattr(sampling, "sample", pausing_sample)
    sizes = figures(page)
    ask(page, steps=10)
    page.get_by_text("Full precision - 27.3%").wait_for()
    page.get_by_text(f"3/{STEPS} steps").wait_for()
    resume.release()
    page.get_by_text("Quantized - 27.3%").wait_for()
    full = served(page, 0)
    assert page.locator(".picture img").count() == 1
    resume.release()
    quantized, apart = served(page, 1), served(page, 2)

    # Another number of threads may round another way.
    assert abs(full - sample_directly(source_folder, 5)).max() <= 1
    assert abs(quantized - sample_directly(packed_folders["cache"], 5)).max() <= 1
    assert np.array_equal(apart, abs(full - quantized)) and apart.any()

    page.get_by_text("PSNR").wait_for()
    shown = figures(page)
    assert shown["PSNR"][-1] == f"{psnr(full, quantized):.2f} dB"
    assert all(re.fullmatch(r"\d+\.\d\d s", cell) for cell in shown["Time"][:2])
    full_file = (source_folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    quantized_file = sum(file.stat().st_size for file in (packed_folders["cache"] / "unet").iterdir())
    assert shown["UNet, file"][:2] == [f"{size / MB:.4g} MB" for size in (full_file, quantized_file)]
    assert shown["UNet, memory"] == sizes["UNet, memory"]


def test_says_in_the_page_what_went_wrong(page):
    ask(page, steps=7)  # not among the timesteps that the model keeps
    page.get_by_text("Timestep 853: the time features of this model are cached for").wait_for()
    page.get_by_label("Seed").fill("")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile("The seed is missing")).wait_for()


def test_asks_nobody_else_and_fits_a_phone(page):
    assert {url for url in page.urls if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url)} == set()
    page.set_viewport_size({"width": 400, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
