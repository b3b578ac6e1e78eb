"""People's votes: on the disk, summed up, and given in a headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

from diffusers_bitsfusion.cli import app
from diffusers_bitsfusion.evaluation import Prompt
from diffusers_bitsfusion.evaluation.image_folder import ImageFolder
from diffusers_bitsfusion.evaluation.votes import QUESTIONS, Vote, VoteStore, preference_report
from diffusers_bitsfusion.evaluation.votes.report import wilson

PROMPTS = [Prompt(f"prompt {i}", ("Animals", "People")[i % 2]) for i in range(6)]
SETTINGS = {"source": "full", "destination": "packed"}
TIMEOUT = 120_000  # milliseconds, for busy machines


@pytest.fixture
def store(tmp_path):
    return VoteStore.create(tmp_path / "votes", PROMPTS, SETTINGS)


def answer_all(store, rater, choose):
    pairs = []
    while (pair := store.next(rater)) is not None:
        pairs.append(pair)
        store.add(Vote(rater, pair.index, pair.question, choose(pair)))
    return pairs


def test_every_prompt_is_asked_once_with_both_questions(store):
    pairs = answer_all(store, "ann", lambda pair: "neither")
    assert sorted((p.index, p.question) for p in pairs) == sorted(product(range(6), QUESTIONS))
    assert [p.answered for p in pairs] == list(range(12)) and {p.total for p in pairs} == {12}
    # Both questions about a pair follow each other, with its pictures in their places.
    assert all((a.index, a.sides) == (b.index, b.sides) for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    assert store.next("ann") is None


def test_the_order_is_random_for_each_rater_and_the_same_after_a_restart(store):
    first = {rater: store.next(rater) for rater in map(str, range(40))}
    assert len({pair.index for pair in first.values()}) == 6
    swapped = sum(pair.sides == ("destination", "source") for pair in first.values())
    assert 8 <= swapped <= 32
    again = VoteStore(store.folder)
    assert {rater: again.next(rater) for rater in first} == first


def test_votes_are_on_the_disk_at_once_and_raters_go_on(store):
    for _ in range(3):
        pair = store.next("ann")
        store.add(Vote("ann", pair.index, pair.question, "source"))
        assert VoteStore(store.folder).votes == store.votes
    store.add(store.votes[0])  # of a second tab
    assert len(store.votes) == 3 and len((store.folder / "votes.jsonl").read_text().splitlines()) == 3
    resumed = VoteStore.create(store.folder, PROMPTS, SETTINGS)
    assert resumed.next("ann") == store.next("ann") and resumed.next("ann").answered == 3
    assert resumed.next("bob").answered == 0


def test_a_vote_that_was_cut_off_is_given_again_and_damage_is_named(store):
    answer_all(store, "ann", lambda pair: "source")
    path = store.folder / "votes.jsonl"
    path.write_text(path.read_text()[:-10])
    resumed = VoteStore(store.folder)
    assert resumed.next("ann").answered == 11
    answer_all(resumed, "ann", lambda pair: "source")
    assert len(VoteStore(store.folder).votes) == 12
    path.write_text('{"rater": "ann"}\n')
    with pytest.raises(ValueError, match=r"votes.jsonl, line 1, is damaged"):
        VoteStore(store.folder)


def test_a_vote_on_other_pictures_is_refused(store, tmp_path):
    with pytest.raises(ValueError, match="holds a vote on other images"):
        VoteStore.create(store.folder, PROMPTS[1:], SETTINGS)
    with pytest.raises(ValueError, match="holds a vote on other images"):
        VoteStore.create(store.folder, PROMPTS, SETTINGS | {"source": "other"})
    with pytest.raises(FileNotFoundError, match="holds no vote"):
        VoteStore(tmp_path / "nowhere")


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (3, 10), (54, 100), (400, 1000)])
def test_wilson_intervals_are_scipys(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    found = wilson(successes, trials)
    assert (found.value, found.low, found.high) == pytest.approx((successes / trials, *expected), abs=1e-6)


def votes_of(*rows):
    """From (rater, choices), a letter a prompt: s, d, n, or a space for none."""
    names = {"s": "source", "d": "destination", "n": "neither"}
    return [
        Vote(rater, index, "better", names[letter])
        for rater, choices in rows
        for index, letter in enumerate(choices)
        if letter != " "
    ]


def test_preferences_by_category_count_what_was_decided():
    report = preference_report(votes_of(("ann", "ddnsdd"), ("bob", "d s nn")), PROMPTS)
    better = report.questions["better"]
    assert list(better) == ["overall", "Animals", "People"]
    overall = better["overall"]
    assert (overall.destination, overall.source, overall.neither) == (5, 2, 3)
    assert overall.preference.value == pytest.approx(5 / 7)
    animals = better["Animals"]  # prompts 0, 2, 4
    assert (animals.destination, animals.source, animals.neither) == (3, 1, 2)
    assert report.questions["text"]["overall"].preference is None
    assert report.raters == {"ann": 6, "bob": 4}
    text = str(report)
    assert "10 votes of 2 raters" in text and "71.4%" in text and "Which image fits the text better?" in text
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["questions"]["better"]["overall"]["source"] == 2
    with pytest.raises(ValueError, match="no votes yet"):
        preference_report([], PROMPTS)


def alpha_by_definition(rows):
    """Krippendorff's alpha from the matrix of coincidences."""
    units = [[row[i] for row in rows if row[i] != " "] for i in range(len(rows[0]))]
    letters = sorted({letter for unit in units for letter in unit})
    matrix = np.zeros((len(letters), len(letters)))
    for unit in units:
        for i, a in enumerate(unit):
            for j, b in enumerate(unit):
                if i != j:
                    matrix[letters.index(a), letters.index(b)] += 1 / (len(unit) - 1)
    n, totals = matrix.sum(), matrix.sum(1)
    observed = n - np.trace(matrix)
    expected = (n**2 - (totals**2).sum()) / (n - 1)
    return 1 - observed / expected


@pytest.mark.parametrize("rows", [("ddssnn", "ddssnd"), ("ddssnn", "d sd  ", "nnss d"), ("dsdsds", "sdsdsd")])
def test_agreement_is_krippendorffs_alpha(rows):
    report = preference_report(votes_of(*zip("abc", rows, strict=False)), PROMPTS)
    agreement = report.agreement["better"]
    assert agreement.alpha == pytest.approx(alpha_by_definition(rows))
    answers = [[row[i] for row in rows if row[i] != " "] for i in range(6)]
    equal = [a == b for given in answers for a, b in combinations(given, 2)]
    assert agreement.pairs == len(equal) and agreement.share == pytest.approx(np.mean(equal))


def test_agreement_of_one_rater_or_of_equal_answers_is_left_open():
    alone = preference_report(votes_of(("ann", "dddddd")), PROMPTS).agreement["better"]
    assert (alone.pairs, alone.share, alone.alpha) == (0, None, None)
    alike = preference_report(votes_of(("ann", "dddddd"), ("bob", "dddddd")), PROMPTS).agreement["better"]
    assert (alike.share, alike.alpha) == (1, None)


def test_the_command_draws_opens_the_page_and_sums_up(
    source_folder, packed_folders, tmp_path, monkeypatch, one_thread
):
    gr = pytest.importorskip("gradio")
    pytest.importorskip("matplotlib")
    launched = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: launched.append(options))
    prompts, out = tmp_path / "prompts.tsv", tmp_path / "votes"
    prompts.write_text("Prompt\tCategory\na\tAnimals\nb\tPeople\n")
    arguments = ["vote", str(source_folder), str(packed_folders["table"]), "--prompts", str(prompts), "--steps", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0 and len(launched) == 1
    assert len(list(out.glob("images/*/0000?.png"))) == 4

    def report():
        return CliRunner().invoke(app, ["vote", "--report", "--out", str(out)])

    assert report().exit_code == 1
    answer_all(VoteStore(out), "ann", lambda pair: "destination")
    result = report()
    assert result.exit_code == 0 and "100.0%" in result.stdout
    assert json.loads((out / "report.json").read_text())["questions"]["text"]["People"]["destination"] == 1
    with Image.open(out / "report.png") as plot:
        assert plot.width > 500
    printed = CliRunner().invoke(app, ["vote", "--report", "--out", str(out), "--json"]).stdout
    assert json.loads(printed) == json.loads((out / "report.json").read_text())
    assert CliRunner().invoke(app, ["vote", "--out", str(out)]).exit_code == 1
    assert CliRunner().invoke(app, ["vote", "--report", "--out", str(tmp_path / "x")]).exit_code == 1


@pytest.fixture
def address(store, tmp_path, monkeypatch):
    """Of the page, serving in this process; the source's pictures are dark, the destination's light."""
    pytest.importorskip("gradio")
    from diffusers_bitsfusion.evaluation.votes.page import build_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    folders = {}
    for side, shade in (("source", 0), ("destination", 200)):
        folders[side] = ImageFolder(tmp_path / side, {})
        for index in range(len(PROMPTS)):
            folders[side].save(index, np.full((32, 32, 3), shade + index, np.uint8))
    page = build_page(store, folders)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield address
    page.close()


@pytest.fixture
def page(address):
    """After `address`: Gradio must not start inside Playwright's event loop."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("No Chromium on PATH: apt-get install -y --no-install-recommends chromium")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", offline])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(TIMEOUT)
        page.goto(address)
        yield page
        browser.close()


def shade(page, label):
    """The first pixel of a picture that shows, as 0 to 255, without what compression changed."""
    image = page.locator(f"#image-{label} img")
    image.wait_for()
    return image.evaluate(
        """image => image.decode().then(() => {
            const canvas = document.createElement("canvas")
            canvas.width = canvas.height = 1
            const context = canvas.getContext("2d")
            context.drawImage(image, 0, 0, 1, 1)
            return context.getImageData(0, 0, 1, 1).data[0]
        })"""
    )


def test_voting_with_keys_in_a_browser(page, store):
    page.get_by_role("button", name="Start").click()
    page.get_by_text(re.compile("Your name is missing")).wait_for()
    page.get_by_label("Your name").fill("ann 120")  # digits that are typed are no votes
    page.get_by_role("button", name="Start").click()
    page.get_by_text("0 of 12 answered").wait_for()
    for number, key in enumerate("1201"):
        pair = store.next("ann 120")
        page.get_by_text(QUESTIONS[pair.question], exact=True).wait_for()
        page.get_by_role("heading", name=PROMPTS[pair.index].caption, exact=True).wait_for()
        lights = [shade(page, label) > 100 for label in ("1", "2")]
        assert lights == [side == "destination" for side in pair.sides]
        page.locator("body").click(position={"x": 2, "y": 2})
        page.keyboard.press(key)
        page.get_by_text(f"{number + 1} of 12 answered").wait_for()
        expected = {"1": pair.sides[0], "2": pair.sides[1], "0": "neither"}[key]
        assert VoteStore(store.folder).votes[number] == Vote("ann 120", pair.index, pair.question, expected)
    page.reload()
    page.get_by_label("Your name").fill("ann 120")
    page.get_by_role("button", name="Start").click()
    page.get_by_text("4 of 12 answered").wait_for()
    for number in range(5, 12):
        page.get_by_role("button", name="2: the right one").click()
        page.get_by_text(f"{number} of 12 answered").wait_for()
    page.get_by_role("button", name="0: neither").click()
    page.get_by_text("Thank you, that was all.").wait_for()
    assert len(VoteStore(store.folder).votes) == 12
