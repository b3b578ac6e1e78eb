"""The page on which people vote, made by Gradio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The page of the vote needs Gradio: pip install diffusers_bitsfusion[app]") from error

from PIL import Image

from ..image_folder import ImageFolder
from .store import NEITHER, QUESTIONS, Vote, VoteStore

# Keys press the buttons, but for those that are typed into a field, and held down.
_KEYS = """
() => document.addEventListener("keydown", event => {
    const typing = ["INPUT", "TEXTAREA"].includes(event.target.tagName)
    if (!typing && !event.repeat && "120".includes(event.key))
        document.querySelector(`#vote-${event.key}`)?.click()
})
"""


def build_page(store: VoteStore, images: Mapping[str, ImageFolder]) -> gr.Blocks:
    """Return the page, to be launched: a name, then prompt by prompt two pictures and two questions.

    Args:
        store: gets the votes.
        images: the pictures of "source" and "destination".
    """

    def show(rater: str) -> list[Any]:
        pair = store.next(rater)
        if pair is None:
            hidden = [gr.update(visible=False)] * 2
            return [(rater, None), "", *hidden, "Thank you, that was all.", "", *[gr.update(visible=False)] * 3]
        pictures = [Image.fromarray(images[side].block([pair.index])[0]) for side in pair.sides]
        return [
            (rater, pair),
            f"## {store.prompts[pair.index].caption}",
            *[gr.update(value=picture, visible=True) for picture in pictures],
            f"### {QUESTIONS[pair.question]}",
            f"{pair.answered} of {pair.total} answered",
            *[gr.update(visible=True)] * 3,
        ]

    def begin(name: str) -> list[Any]:
        if not name.strip():
            raise gr.Error("Your name is missing: votes are counted by it, and you go on by it later.")
        return show(name.strip())

    def answer(place: int | None, shown: tuple[str, Any]) -> list[Any]:
        rater, pair = shown
        choice = NEITHER if place is None else pair.sides[place]
        store.add(Vote(rater, pair.index, pair.question, choice))
        return show(rater)

    with gr.Blocks(title="Which image is better?", analytics_enabled=False) as page:
        with gr.Row(equal_height=True):
            name = gr.Textbox(label="Your name", scale=4)
            start = gr.Button("Start", variant="primary")
        shown = gr.State()
        prompt = gr.Markdown()
        with gr.Row():
            left, right = (
                gr.Image(label=label, visible=False, interactive=False, buttons=[], elem_id=f"image-{label}")
                for label in ("1", "2")
            )
        question = gr.Markdown()
        with gr.Row():
            buttons = [
                gr.Button(text, visible=False, elem_id=f"vote-{key}")
                for key, text in (("1", "1: the left one"), ("0", "0: neither"), ("2", "2: the right one"))
            ]
        progress = gr.Markdown()
        outputs = [shown, prompt, left, right, question, progress, *buttons]
        gr.on([start.click, name.submit], begin, name, outputs)
        for button, place in zip(buttons, (0, None, 1), strict=True):
            button.click(lambda shown, place=place: answer(place, shown), shown, outputs)
        page.load(None, None, None, js=_KEYS)
    return page
