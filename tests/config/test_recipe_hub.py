"""A recipe pushed to a Hub and loaded from it, with the real client in a fresh process."""

from __future__ import annotations

import json

from hub_server import Fault, Hub

TOKEN = "hf_secret"
CODE = """
import json, sys
from huggingface_hub.errors import HfHubHTTPError
from diffusers_bitsfusion import Recipe

token = sys.argv[1]
recipe = Recipe({"a": 1, "b.c": 4}, source="a test", shapes={"a": (4, 3)})
recipe.push_to_hub("me/recipe", token=token, commit_message="First")
recipe.push_to_hub("me/recipe", token=token)
loaded = Recipe.load("me/recipe", token=token)
assert (dict(loaded), loaded.source, loaded.shapes) == ({"a": 1, "b.c": 4}, "a test", {"a": (4, 3)})
try:
    recipe.push_to_hub("me/refused", token=token)
except HfHubHTTPError as error:
    print(error)
"""


def test_a_recipe_is_pushed_and_loaded_by_its_id_and_a_refusal_explained(run_python, tmp_path):
    hub = Hub()
    hub.token = TOKEN
    hub.faults["me/refused"] = Fault(status=403, requests="commit")
    with hub.running():
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        result = run_python(CODE, TOKEN, environment=settings)
    assert result.returncode == 0, result.stderr[-3000:]
    files = hub.repositories["me/recipe"].files
    assert json.loads(files["recipe.json"])["layers"] == {"a": 1, "b.c": 4}
    assert "Nothing was committed to me/refused. The token may not write there" in result.stdout
