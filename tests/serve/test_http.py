"""The routes: OpenAI's fields, events, error shape and codes, limits, keys, health and metrics."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import socket
import struct
import threading
import time
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from blip3o_rt.serve.log import JsonLines
from blip3o_rt.serve.schema import GenerationRequest
from tests.serve.conftest import RunningServer
from tests.serve.fakes import SIDE, TOKENS, fake_image

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
START_COMMON = {
    "b64_json",
    "created_at",
    "size",
    "quality",
    "background",
    "output_format",
    "index",
    "seed",
    "type",
}


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a circle", "seed": 5, "steps": 4, **fields}


def opened(data: str | bytes) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))
    image.load()
    return image


def samples(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


def png(red: int = 9, size: tuple[int, int] = (20, 10), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, format)
    return file.getvalue()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    found = []
    for block in response.text.split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith(":")]
        if lines:
            name, data = lines
            parsed = json.loads(data.removeprefix("data: "))
            assert name == f"event: {parsed['type']}"
            found.append(parsed)
    return found


def head(length: int) -> bytes:
    kind = "Content-Type: application/json"
    return f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"]
    return found


def test_images_with_their_seeds_times_and_usage(server: RunningServer) -> None:
    answer = server.http.post(GENERATIONS, json=body(n=3)).json()
    assert set(answer) == {"created", "background", "output_format", "size", "data", "usage"}
    assert abs(answer["created"] - time.time()) < 60
    assert answer["size"] == f"{SIDE}x{SIDE}"
    assert answer["usage"] == {
        "input_tokens": 2,
        "input_tokens_details": {"text_tokens": 2, "image_tokens": 0},
        "output_tokens": 3 * TOKENS,
        "total_tokens": 2 + 3 * TOKENS,
    }
    for number, data in enumerate(answer["data"]):
        assert data["seed"] == 5 + number
        assert set(data["seconds"]) == {"queue", "reference", "tokens", "denoise", "decode"}
        assert data["tokens_per_pass"] == 1.0
        assert samples(opened(data["b64_json"])) == fake_image("a circle", 5 + number, 4)


def test_a_seed_is_drawn_where_none_is_given_and_draws_the_same_again(server: RunningServer) -> None:
    first, other = (
        server.http.post(GENERATIONS, json={"prompt": "a", "steps": 2}).json()["data"][0] for _ in "ab"
    )
    assert first["seed"] != other["seed"]
    again = server.http.post(GENERATIONS, json={"prompt": "a", "steps": 2, "seed": first["seed"]}).json()[
        "data"
    ][0]
    assert again["b64_json"] == first["b64_json"]


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_formats_and_links(server: RunningServer, output_format: str) -> None:
    fields = body(output_format=output_format, response_format="url", output_compression=90)
    url = server.http.post(GENERATIONS, json=fields).json()["data"][0]["url"]
    response = server.http.get(url)
    assert response.headers["content-type"] == f"image/{output_format}"
    image = opened(response.content)
    assert image.format == output_format.upper()
    if output_format == "png":
        assert samples(image) == fake_image("a circle", 5, 4)
        assert json.loads(image.text["blip3o_rt"])["prompt"] == "a circle"  # type: ignore[attr-defined]
    assert error(server.http.get("/v1/results/nothing.png"), 404)["code"] == "image_not_found"


@pytest.mark.parametrize("field", ["image", "image[]"])
def test_edits_take_a_file(server: RunningServer, field: str) -> None:
    answer = server.http.post(EDITS, data=body(n=2), files={field: ("a.png", png(77))}).json()
    for number, data in enumerate(answer["data"]):
        assert samples(opened(data["b64_json"])) == fake_image("a circle", 5 + number, 4, 77)


def test_a_form_takes_every_field(server: RunningServer) -> None:
    fields = body(guidance=1.5, temperature=0.5, top_k=3, top_p=0.5, draft_window=1, priority=1, timeout=60)
    fields |= {
        "size": "auto",
        "response_format": "b64_json",
        "output_format": "png",
        "user": "me",
        "quality": "auto",
    }
    answer = server.http.post(EDITS, data=fields, files={"image": png(3)})
    assert answer.status_code == 200, answer.text


def test_events_field_by_field(server: RunningServer) -> None:
    fields = body(stream=True, partial_images=2, steps=6)
    for path, kind, send in (
        (GENERATIONS, "image_generation", {"json": fields}),
        (EDITS, "image_edit", {"data": fields, "files": {"image": png()}}),
    ):
        response = server.http.post(path, **send)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        *partials, completed = events(response)
        assert [event["type"] for event in partials] == [f"{kind}.partial_image"] * 2
        for number, event in enumerate(partials):
            assert set(event) == {*START_COMMON, "partial_image_index"}
            assert event["partial_image_index"] == number
            assert samples(opened(event["b64_json"])) == bytes([2 * number + 2]) * (SIDE * SIDE * 3)
        assert completed["type"] == f"{kind}.completed"
        assert set(completed) == {*START_COMMON, "usage", "seconds", "tokens_per_pass"}
        assert set(completed["usage"]) == {
            "input_tokens",
            "input_tokens_details",
            "output_tokens",
            "total_tokens",
        }
        for event in (*partials, completed):
            assert isinstance(event["created_at"], int)
            assert (event["size"], event["quality"], event["background"]) == (
                f"{SIDE}x{SIDE}",
                "auto",
                "opaque",
            )
            assert (event["output_format"], event["index"], event["seed"]) == ("png", 0, 5)
        reference = 9 if kind == "image_edit" else 0
        assert samples(opened(completed["b64_json"])) == fake_image("a circle", 5, 6, reference)


def test_progress_and_queue_position_on_request(server: RunningServer) -> None:
    found = events(server.http.post(GENERATIONS, json=body(stream=True, progress=True, prompt="slow", n=2)))
    stages = {
        (event["index"], event["stage"]) for event in found if event["type"] == "image_generation.progress"
    }
    assert stages == {(index, stage) for index in (0, 1) for stage in ("tokens", "denoise")}
    assert [event["index"] for event in found if event["type"] == "image_generation.completed"] == [0, 1]


def test_an_error_in_a_stream_is_an_event_and_one_before_it_a_status(server: RunningServer) -> None:
    last = events(server.http.post(GENERATIONS, json=body(stream=True, prompt="nan")))[-1]
    assert last["type"] == "error"
    assert last["error"]["message"] == "the decoder's logits are not finite"
    for prompt in (" ", "\x1f", "\x00\x85", "\n\u2003"):
        refused = server.http.post(GENERATIONS, json=body(stream=True, prompt=prompt))
        assert error(refused, 400)["param"] == "prompt"


def test_the_schema_says_which_prompts_show_nothing() -> None:
    """In the schema too: a client that reads it sends none."""
    pattern = GenerationRequest.model_json_schema()["properties"]["prompt"]["pattern"]
    spaces_and_controls = {"Cc", "Zs", "Zl", "Zp"}
    blank = [char for char in map(chr, range(0x3001)) if unicodedata.category(char) in spaces_and_controls]
    assert not [char for char in blank if re.search(pattern, char)]
    assert all(re.search(pattern, text) for text in ("a", "\u00e9", " \u7ea2 ", "\x1fa"))


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"prompt": ""}, 400, "prompt", "invalid_prompt"),
        ({"prompt": "  "}, 400, "prompt", "invalid_prompt"),
        ({"prompt": 3}, 400, "prompt", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"n": 11}, 400, "n", "invalid_value"),
        ({"n": "2"}, 400, "n", "invalid_value"),
        ({"size": "1x1"}, 400, "size", "invalid_value"),
        ({"seed": -1}, 400, "seed", "invalid_value"),
        ({"seed": 2**63}, 400, "seed", "invalid_value"),
        ({"seed": 2**63 - 1, "n": 2}, 400, None, "invalid_value"),
        ({"steps": 101}, 400, "steps", "invalid_value"),
        ({"guidance": "much"}, 400, "guidance", "invalid_value"),
        ({"output_format": "gif"}, 400, "output_format", "invalid_value"),
        ({"background": "transparent"}, 400, "background", "invalid_value"),
        ({"draft_window": 17}, 400, "draft_window", "invalid_value"),
        ({"stream": True, "partial_images": 4}, 400, "partial_images", "invalid_value"),
        ({"colour": "red"}, 400, "colour", "unknown_parameter"),
        ({"model": "dall-e-3"}, 404, "model", "model_not_found"),
        ({"prompt": "bug"}, 500, None, "generation_failed"),
        ({"prompt": "memory"}, 503, None, "insufficient_memory"),
        ({"prompt": "slow", "steps": 100, "timeout": 1}, 504, None, "deadline_exceeded"),
    ],
)
def test_refusals(
    server: RunningServer, fields: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    found = error(server.http.post(GENERATIONS, json=body(**fields)), status)
    assert (found["param"], found["code"]) == (param, code)


def test_bodies_that_are_not_what_they_should_be(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff", b'{"prompt": "\\ud800"}', b"[]", b'"a"', b"NaN"):
        error(server.http.post(GENERATIONS, content=content, headers=headers), 400)
    error(server.http.post(EDITS, content=b"x", headers={"Content-Type": "multipart/form-data"}), 400)
    error(server.http.post(EDITS, json=body()), 400)
    assert error(server.http.get(GENERATIONS.replace("images", "none")), 404)["code"] == "not_found"
    assert error(server.http.put(GENERATIONS), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize("given", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_type_is_said_to_be_one(server: RunningServer, given: str | None) -> None:
    headers = {} if given is None else {"Content-Type": given}
    for path, accepted in ((GENERATIONS, "application/json"), (EDITS, "multipart/form-data")):
        found = error(server.http.post(path, content=json.dumps(body()), headers=headers), 400)
        assert found["code"] == "unsupported_content_type"
        assert accepted in found["message"]


@pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_object_is_said_to_be_none(server: RunningServer, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    found = error(server.http.post(GENERATIONS, content=content, headers=headers), 400)
    assert found["code"] == "invalid_json"
    assert "JSON" in found["message"]


def test_a_null_is_a_field_left_out(server: RunningServer) -> None:
    schema = server.http.get("/openapi.json").json()["components"]["schemas"]["GenerationRequest"]
    nullable = [
        name for name, field in schema["properties"].items() if {"type": "null"} in field.get("anyOf", ())
    ]
    assert sorted([*nullable, "prompt"]) == sorted(schema["properties"])
    fields = {**dict.fromkeys(nullable), "prompt": "a", "seed": 5, "steps": 2}
    answer = server.http.post(GENERATIONS, json=fields).json()
    assert samples(opened(answer["data"][0]["b64_json"])) == fake_image("a", 5, 2)
    assert error(server.http.post(GENERATIONS, json={"prompt": None}), 400)["param"] == "prompt"
    assert error(server.http.post(GENERATIONS, json=body(colour=None)), 400)["param"] == "colour"


def test_what_a_client_sends_is_named_in_a_short_line(server: RunningServer) -> None:
    long = "a\nb" * 20_000
    answers = [
        server.http.post(GENERATIONS, json=body(**fields))
        for fields in ({"model": long}, {"size": long}, {long: 1}, {"quality": long}, {"n": long})
    ]
    answers.append(server.http.post(EDITS, data={**body(), long[:3000]: "1"}, files={"image": png()}))
    answers.append(server.http.post(EDITS, data=body(), files={"image[0]": png()}))
    for answer in answers:
        error(answer, 400)
        assert len(answer.text) < 600
    assert "image[]" in error(answers[-1], 400)["message"]
    for path in ("/nothing%0A/" + "a" * 9000, "/v1/models/" + "a" * 9000, "/v1/results/" + "a" * 9000):
        answer = server.http.get(path)
        error(answer, 404)
        assert len(answer.text) < 600


def test_head_is_get_without_a_body(server: RunningServer) -> None:
    for path in ("/", "/health", "/ready", "/v1/models", "/page/page.js"):
        assert (server.http.head(path).status_code, server.http.head(path).content) == (200, b"")
    refused = server.http.head(GENERATIONS)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_the_description_has_the_exact_bounds_of_a_seed(server: RunningServer) -> None:
    assert '"maximum":9223372036854775807,' in server.http.get("/openapi.json").text
    assert "e+18" not in server.http.get("/openapi.json").text


def test_files_that_cannot_be_edited(server: RunningServer) -> None:
    def refused(**files: Any) -> dict[str, Any]:
        return error(server.http.post(EDITS, data=body(), files=files), 400)

    assert refused(image=b"")["code"] == "invalid_image"
    assert "not an image" in refused(image=b"text")["message"]
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(noise, "PNG")
    assert refused(image=noise.getvalue()[:2000])["code"] == "invalid_image"
    assert "pixels" in refused(image=png(size=(400, 400)))["message"]  # 160,000 of 100,000
    assert refused(image=png(), mask=png())["code"] == "unsupported_parameter"
    assert refused(other=png())["param"] == "other"
    found = error(server.http.post(EDITS, data=body(), files=[("image[]", png())] * 17), 400)
    assert found["param"] == "image"
    found = error(server.http.post(EDITS, files={"prompt": (None, "a"), "image": (None, "text")}), 400)
    assert found["param"] == "image"


def test_a_decompression_bomb_is_refused_by_its_header(server: RunningServer) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (400, 10_000, 60_000):  # the last would be 11 GB
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        found = error(server.http.post(EDITS, data=body(), files={"image": bomb + chunk(b"IEND", b"")}), 400)
        assert "at most 100000 pixels are accepted" in found["message"]


def test_an_upright_image_reaches_the_engine(server: RunningServer) -> None:
    turned = Image.fromarray(np.repeat(np.uint8([[[1, 0, 0]], [[2, 0, 0]]]), 8, axis=1).repeat(8, axis=0))
    exif = Image.Exif()
    exif[274] = 3  # upside down
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    answer = server.http.post(EDITS, data=body(), files={"image": file.getvalue()}).json()
    assert samples(opened(answer["data"][0]["b64_json"])) == fake_image("a circle", 5, 4, 2)


def test_a_client_that_goes_is_cancelled(server: RunningServer) -> None:
    before = server.metric('blip3o_requests_total{reason="Cancelled",state="cancelled"}')
    for stream in (False, True):
        text = json.dumps(body(prompt="slow", steps=100, stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as sock:
            sock.sendall(head(len(text)) + text)
            server.wait_until(lambda: server.health()["running"] == 1)
        server.wait_until(lambda: server.health()["running"] == 0, 10)
    server.wait_until(
        lambda: server.metric('blip3o_requests_total{reason="Cancelled",state="cancelled"}') == before + 2
    )


def test_models_health_ready_and_metrics(server: RunningServer) -> None:
    card = server.http.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["size"], card["edits"]) == (
        "fake",
        "model",
        f"{SIDE}x{SIDE}",
        True,
    )
    assert server.http.get("/v1/models/fake").json() == card
    assert error(server.http.get("/v1/models/other"), 404)["code"] == "model_not_found"
    health = server.health()
    assert (health["status"], health["ready"], health["engine_restarts"]) == ("ok", True, 0)
    server.http.post(GENERATIONS, json=body(n=2))
    text = server.http.get("/metrics").text
    for name in (
        "blip3o_num_requests_running 0.0",
        "blip3o_num_requests_waiting 0.0",
        "blip3o_e2e_request_latency_seconds_count",
        "blip3o_request_queue_time_seconds_count",
        'blip3o_stage_time_seconds_count{stage="denoise"}',
        "blip3o_tokens_per_pass_count",
        "blip3o_images_total",
        'blip3o_requests_total{reason="",state="completed"}',
        "blip3o_engine_restarts 0.0",
        "blip3o_event_loop_delay_seconds_count",
    ):
        assert name in text
    server.wait_until(lambda: server.metric('blip3o_token_passes_total{batch_size="2"}') >= TOKENS)


def test_every_answer_has_a_request_id_and_headers_of_caution(server: RunningServer) -> None:
    response = server.http.get("/health", headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert len(server.http.get("/health", headers={"X-Request-Id": "bad id"}).headers["x-request-id"]) == 32


@pytest.mark.parametrize("asked", [False, True])
def test_the_log_has_the_request_id_and_prompts_only_where_asked_for(
    asked: bool, start: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = io.StringIO()
    handler = logging.StreamHandler(texts)
    handler.setFormatter(JsonLines())
    for name in ("blip3o_rt", "uvicorn"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
        caplog.set_level(logging.DEBUG, name)
    server = start(log_prompts=asked).wait_ready()
    ids = []
    for prompt in ("confidential circle", "confidential nan", "confidential memory"):
        ids.append(server.http.post(GENERATIONS, json=body(prompt=prompt)).headers["x-request-id"])
    server.http.post(GENERATIONS, json=body(prompt="confidential", n=0))
    server.http.post(EDITS, data=body(prompt="confidential"), files={"image": b"confidential"})
    job = server.http.post("/v1/jobs", json=body(prompt="confidential bug")).json()["id"]
    server.wait_until(lambda: server.http.get(f"/v1/jobs/{job}").json()["status"] == "failed")
    lines = [json.loads(line) for line in texts.getvalue().splitlines()]
    assert set(ids) <= {line.get("request_id") for line in lines}
    first = next(line for line in lines if line.get("request_id") == ids[0])
    assert (first["path"], first["status"], first["steps"]) == (GENERATIONS, 200, 4)
    assert ("confidential" in json.dumps(lines)) is asked


def test_requests_past_what_is_answered_at_once_are_refused(start: Any) -> None:
    server = start(max_requests=1).wait_ready()
    slow = body(prompt="slow", steps=50)
    waiting = threading.Thread(target=lambda: httpx.post(server.url + GENERATIONS, json=slow, timeout=60))
    waiting.start()
    server.wait_until(lambda: server.health()["running"] == 1)  # which is still answered
    refused = server.http.post(GENERATIONS, json=body())
    assert error(refused, 503)["code"] == "too_many_requests"
    assert int(refused.headers["retry-after"]) >= 1
    waiting.join()
    assert server.http.post(GENERATIONS, json=body()).status_code == 200


def test_the_page_and_its_files(server: RunningServer) -> None:
    for path in ("/", "/docs", "/page/page.js", "/page/page.css", "/favicon.ico"):
        assert server.http.get(path).status_code == 200
    for path in ("/page/nothing.js", "/page/..%2Fapp.py", "/page/%2e%2e/app.py"):
        assert server.http.get(path).status_code == 404
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {GENERATIONS, EDITS, "/v1/models", "/v1/jobs", "/health", "/ready", "/metrics"} <= set(paths)


def test_keys(start: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret-secret-secret alice\nother-other-other-1 bob\n")
    server = start(keys=keys).wait_ready()
    refused = server.http.post(GENERATIONS, json=body())
    assert error(refused, 401)["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    assert error(server.http.get("/metrics", headers={"Authorization": "Bearer wrong"}), 401)
    alice = {"Authorization": "Bearer secret-secret-secret"}
    assert server.http.post(GENERATIONS, json=body(), headers=alice).status_code == 200
    job = server.http.post("/v1/jobs", json=body(), headers=alice).json()
    linked = server.http.post(GENERATIONS, json=body(response_format="url"), headers=alice).json()
    assert server.http.get(linked["data"][0]["url"]).status_code == 200  # as in a page: without a key
    described = server.http.get("/openapi.json").json()["paths"]
    closed = {
        path
        for path, found in described.items()
        if any("security" in operation for operation in found.values())
    }
    assert {GENERATIONS, EDITS, "/v1/jobs", "/metrics"} <= closed
    assert not {"/health", "/ready", "/v1/results/{name}"} & closed
    bob = {"Authorization": "Bearer other-other-other-1"}
    assert error(server.http.get(f"/v1/jobs/{job['id']}", headers=bob), 404)
    assert server.http.get(f"/v1/jobs/{job['id']}", headers=alice).status_code == 200
    assert server.http.get("/v1/jobs", headers=bob).json()["data"] == []
    for number in range(6):
        server.http.post("/v1/jobs", json=body(user=str(number)), headers=bob)
    listed = server.http.get("/v1/jobs?limit=1", headers=alice).json()["data"]
    assert [found["id"] for found in listed] == [job["id"]]
    assert len(server.http.get("/v1/jobs", headers=bob).json()["data"]) == 6


def test_limits_on_bodies_queue_and_clients(start: Any) -> None:
    from blip3o_rt.serve.client import Limits

    server = start(max_body=2000, limits=Limits(queue=4, client_queue=3)).wait_ready()
    assert error(server.http.post(GENERATIONS, json=body(prompt="a" * 3000)), 413)["code"] == "body_too_large"

    def pieces() -> Any:  # without a length
        for _ in range(10):
            yield b'{"prompt": "' + b"a" * 500

    headers = {"Content-Type": "application/json"}
    assert (
        error(server.http.post(GENERATIONS, content=pieces(), headers=headers), 413)["code"]
        == "body_too_large"
    )
    slow = body(prompt="slow", steps=50, n=3, user="one")
    waiting = threading.Thread(target=lambda: httpx.post(server.url + GENERATIONS, json=slow, timeout=60))
    waiting.start()
    server.wait_until(lambda: server.health()["running"] + server.health()["waiting"] == 3)
    full = server.http.post(GENERATIONS, json=body(user="one"))
    assert error(full, 429)["code"] == "client_queue_full"
    assert int(full.headers["retry-after"]) >= 1
    assert error(server.http.post(GENERATIONS, json=body(n=2)), 429)["code"] == "queue_full"
    assert server.http.post(GENERATIONS, json=body()).status_code == 200
    waiting.join()


def test_slow_clients_are_answered_and_closed_and_disturb_nobody(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blip3o_rt.serve import middleware
    from blip3o_rt.serve import server as server_module

    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(middleware.BodyLimits.__init__, "__defaults__", (0.5, 2.0))
    server = start().wait_ready()
    port = int(server.url.rsplit(":", 1)[1])
    with (
        socket.create_connection(("127.0.0.1", port)) as headers,
        socket.create_connection(("127.0.0.1", port)) as slow,
    ):
        headers.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ")
        slow.sendall(head(99) + b"{")
        assert server.http.post(GENERATIONS, json=body()).status_code == 200
        headers.settimeout(10)
        slow.settimeout(10)
        assert headers.recv(100) == b""
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
