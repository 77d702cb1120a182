"""The routes of the server."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response

from blip3o_rt import __version__
from blip3o_rt.errors import Blip3oError
from blip3o_rt.params import MAX_SEED
from blip3o_rt.serve.api_error import ApiError, api_error
from blip3o_rt.serve.client import EngineClient
from blip3o_rt.serve.jobs import Jobs
from blip3o_rt.serve.messages import ModelInfo, RawImage
from blip3o_rt.serve.middleware import OPEN_PATHS
from blip3o_rt.serve.schema import (
    EditRequest,
    ErrorResponse,
    GenerationRequest,
    Health,
    ImagesResponse,
    Job,
    JobList,
    JobRequest,
    ModelCard,
    ModelList,
)
from blip3o_rt.serve.service import EDIT, GENERATION, Service, charged_to

PAGE = Path(__file__).parent / "page"
MAX_FILES = 16
UNREADABLE = "There was an error parsing the body"  # the framework's words
LINK = re.compile(r"[\w-]{20,64}\.(png|jpeg|webp)")
STATUS_OF_HEALTH = {"ok": 200, "loading": 200, "draining": 200}  # of others: 503

JobId = Annotated[str, PathParameter(max_length=64, description="The job's id.")]
JobImageIndex = Annotated[int, PathParameter(ge=0, le=63)]

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "A field is wrong; `param` says which."},
    401: {"model": ErrorResponse, "description": "The API key is missing or wrong."},
    404: {"model": ErrorResponse, "description": "There is no such model, job or image."},
    408: {"model": ErrorResponse, "description": "The body came too slowly."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    429: {"model": ErrorResponse, "description": "The queue is full: try again after Retry-After seconds."},
    500: {"model": ErrorResponse, "description": "The image could not be drawn."},
    503: {"model": ErrorResponse, "description": "No engine, memory or disk for it now: see Retry-After."},
    504: {"model": ErrorResponse, "description": "The request was not finished in time."},
}
EVENTS = {
    "application/json": {},
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "An event: its name, and its data as JSON.",
            "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
            "required": ["event", "data"],
        },
    },
}


def only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Some of the errors."""
    return {status: ERRORS[status] for status in statuses}


def make_app(service: Service, jobs: Jobs, keyed: bool) -> FastAPI:
    """The application: routes, error answers and the description of both."""
    app = FastAPI(
        title="blip3o-rt",
        version=__version__,
        summary="Text-to-image and image editing with BLIP3o-NEXT, by OpenAI's images API.",
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(image_routes(service))
    app.include_router(job_routes(service, jobs))
    app.include_router(server_routes(service))
    app.include_router(page_routes())
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Blip3oError, _blip3o_error)
    app.add_exception_handler(Exception, _unexpected_error)
    app.openapi = lambda: _openapi(app, service, keyed)  # type: ignore[method-assign]
    return app


def image_routes(service: Service) -> APIRouter:
    """OpenAI's images."""
    router = APIRouter(tags=["images"])

    @router.post(
        "/v1/images/generations",
        response_model=ImagesResponse,
        responses={200: {"content": EVENTS}, **only(400, 401, 404, 408, 413, 429, 500, 503, 504)},
    )
    async def generations(request: Request, body: GenerationRequest) -> Any:
        """Draw images of a prompt.

        With `stream`, events: `image_generation.partial_image`, `.completed`, and with `progress` also
        `.queued` and `.progress`; an `error` event where the request fails.
        """
        return await service.respond(request, body, (), GENERATION)

    @router.post(
        "/v1/images/edits",
        response_model=ImagesResponse,
        responses={200: {"content": EVENTS}, **only(400, 401, 404, 408, 413, 429, 500, 503, 504)},
        openapi_extra={
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _edit_schema()}}}
        },
    )
    async def edits(request: Request) -> Any:
        """Draw what the prompt makes of the reference image. With `stream`, events `image_edit.*`."""
        if (error := wrong_type(request, "multipart/form-data")) is not None:
            raise error
        async with request.form(max_files=MAX_FILES + 1, max_fields=64, max_part_size=1 << 16) as form:
            body, uploads = edit_form(form)
            service.check(body)
            references = await read_uploads(service, uploads)
        return await service.respond(request, body, references, EDIT)

    @router.get("/v1/results/{name}", response_class=Response, responses=only(404))
    async def linked(name: str) -> Response:
        """An image of a response with `response_format` `url`; its link is all that it needs."""
        data = await service.store.linked(name) if LINK.fullmatch(name) else None
        if data is None:
            raise ApiError(404, "there is no such image, or no longer", code="image_not_found")
        return _image_response(data, name.rpartition(".")[2])

    return router


def job_routes(service: Service, jobs: Jobs) -> APIRouter:
    """Requests that are answered at once and finished later."""
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    of_created = {"parameters": {"id": "$response.body#/id"}}
    links = {
        name: {"operationId": f"{name}_job", **of_created, "description": text}
        for name, text in (("show", "How far the job is."), ("cancel", "Cancels the job."))
    }

    @router.post(
        "",
        status_code=202,
        response_model=Job,
        responses={202: {"links": links}, **only(400, 401, 404, 408, 413, 429, 503)},
    )
    async def create(request: Request, body: JobRequest) -> Job:
        """Accept a job. It is finished whatever becomes of this connection, the engine or this server."""
        service.check(body)
        return await jobs.accept(body, charged_to(request, body))

    @router.get("", response_model=JobList, responses=only(400, 401))
    async def newest(request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> JobList:
        """The newest jobs."""
        found = await service.store.newest(_owner(request), limit)
        return JobList(data=[jobs.show(job) for job in found])

    @router.get("/{id}", operation_id="show_job", response_model=Job, responses=only(400, 401, 404))
    async def show(request: Request, id: JobId) -> Job:
        """How far a job is."""
        return jobs.show(await jobs.find(id, _owner(request)))

    @router.post(
        "/{id}/cancel", operation_id="cancel_job", response_model=Job, responses=only(400, 401, 404, 503)
    )
    async def cancel(request: Request, id: JobId) -> Job:
        """Cancel a job; one that has ended stays as it is."""
        return jobs.show(await jobs.cancel(await jobs.find(id, _owner(request))))

    @router.get("/{id}/images/{index}", response_class=Response, responses=only(400, 401, 404))
    async def image(request: Request, id: JobId, index: JobImageIndex) -> Response:
        """An image of a job."""
        await jobs.find(id, _owner(request))
        found = await service.store.image(id, index)
        if found is None:
            raise ApiError(404, f"job {id!r} has no image {index} yet", code="image_not_found")
        return _image_response(*found)

    return router


def server_routes(service: Service) -> APIRouter:
    """What the server says of itself."""
    router = APIRouter(tags=["server"])
    client, began = service.client, int(time.time())

    @router.get("/v1/models", response_model=ModelList, responses=only(401))
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[] if client.info is None else [_card(client.info, began)])

    @router.get("/v1/models/{name}", response_model=ModelCard, responses=only(401, 404))
    async def model(name: str) -> ModelCard:
        """The model by its name."""
        if client.info is None or client.info.name != name:
            raise ApiError(
                404, f"the model {short(name)!r} is not here", param="model", code="model_not_found"
            )
        return _card(client.info, began)

    @router.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """What the engine does; 503 where it is not there or does not answer."""
        found = health_of(client)
        response.status_code = STATUS_OF_HEALTH.get(found.status, 503)
        return found

    @router.get("/ready", response_model=Health, responses={503: {"model": Health}})
    async def ready(response: Response) -> Health:
        """Whether requests are taken: 200 once the model is loaded, warm and captured, else 503."""
        found = health_of(client)
        response.status_code = 200 if found.ready else 503
        return found

    @router.get("/metrics", response_class=Response, responses=only(401))
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.text(client), media_type="text/plain; version=0.0.4")

    return router


def page_routes() -> APIRouter:
    """The page, and the description of the API for people."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @router.get("/docs")
    async def docs() -> Response:
        return FileResponse(PAGE / "docs.html", headers={"Cache-Control": "no-cache"})

    @router.get("/favicon.ico")
    async def icon() -> Response:
        return FileResponse(PAGE / "icon.svg", media_type="image/svg+xml")

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in {path.name for path in PAGE.iterdir()}:
            raise ApiError(404, f"there is no page file {name!r}", code="not_found")
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    return router


def health_of(client: EngineClient) -> Health:
    """What is known of the engine now."""
    process, now = client.process, time.monotonic()
    status = "draining" if client.draining and client.status == "ok" else client.status
    beat = process.heartbeat if process is not None else None
    return Health(
        status=status,  # type: ignore[arg-type]
        ready=client.ready,
        engine_pid=process.pid if process is not None else None,
        seconds_since_heartbeat=round(now - process.heard, 3) if process is not None else None,
        seconds_since_progress=round(now - process.progressed, 3) if process is not None else None,
        engine_restarts=client.restarts,
        engine_memory_bytes=beat.memory if beat is not None else None,
        running=client.running,
        waiting=client.waiting,
        message=client.load_error,
    )


def edit_form(form: FormData) -> tuple[EditRequest, list[UploadFile]]:
    """The fields of a form, and its images. Raises ApiError."""
    fields: dict[str, str] = {}
    uploads: list[UploadFile] = []
    for name, value in form.multi_items():
        if name == "mask":
            raise ApiError(
                400,
                "mask is not accepted: the model edits the whole image, say in the prompt what to change",
                param="mask",
                code="unsupported_parameter",
            )
        if name in ("image", "image[]"):
            if not isinstance(value, UploadFile):
                raise ApiError(400, "image is text: send it as a file", param="image", code="invalid_image")
            uploads.append(value)
        elif isinstance(value, UploadFile) and name not in EditRequest.model_fields:
            message = f"there is no file {short(name)!r}: accepted are image and image[]"
            raise ApiError(400, message, param=short(name), code="unknown_parameter")
        elif isinstance(value, UploadFile) or name in fields:
            raise ApiError(
                400, f"{short(name)} is accepted once, as text", param=short(name), code="invalid_value"
            )
        else:
            fields[name] = value
    try:
        body = EditRequest.model_validate(fields, strict=False)
    except ValidationError as error:
        raise _first_error(error.errors()) from None
    if not 1 <= len(uploads) <= MAX_FILES:
        raise ApiError(
            400,
            f"{len(uploads)} images were sent: accepted is 1 to {MAX_FILES}",
            param="image",
            code="invalid_image",
        )
    return body, uploads


async def read_uploads(service: Service, uploads: list[UploadFile]) -> tuple[RawImage, ...]:
    """Uploaded files as images. Raises ImageError."""
    images = []
    for number, upload in enumerate(uploads):
        name = "image" if len(uploads) == 1 else f"image[{number}]"
        images.append(await service.workers.decode(await upload.read(), name))
    return tuple(images)


def _owner(request: Request) -> str | None:
    """Whose jobs a request may see: those of its key; without keys everybody's."""
    return str(request.state.client) if request.state.keyed else None


def _image_response(data: bytes, suffix: str) -> Response:
    headers = {"Cache-Control": "private, max-age=86400, immutable"}
    return Response(data, media_type=f"image/{suffix}", headers=headers)


def _card(info: ModelInfo, began: int) -> ModelCard:
    return ModelCard(
        id=info.name,
        created=began,
        size=info.size,
        edits=info.edits,
        max_references=info.max_references,
        max_prompt_tokens=info.max_prompt_tokens,
        tokens_per_image=info.tokens_per_image,
        device=info.device,
        dtype=info.dtype,
        tier=info.tier,
    )


def _edit_schema() -> dict[str, Any]:
    """The form of an edit; a field that is left out is the only null there is in a form."""
    schema = EditRequest.model_json_schema()
    for field in schema["properties"].values():
        for kind in field.pop("anyOf", []):
            if kind != {"type": "null"}:
                field.update(kind)
        if field.get("default") is None:
            field.pop("default", None)
    file = {"type": "string", "format": "binary"}
    schema["properties"] = {
        "image": {
            "anyOf": [file, {"type": "array", "items": file}],
            "description": "The reference image's file.",
        },
        "image[]": {
            "type": "array",
            "items": file,
            "description": "Reference images, where the model takes several.",
        },
        **schema["properties"],
    }
    schema["required"] = [*schema["required"], "image"]
    return schema


def _openapi(app: FastAPI, service: Service, keyed: bool) -> dict[str, Any]:
    """The description: with keys where they are asked for, this server's limits, and one shape of errors."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    components = schema.setdefault("components", {})
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation.get("responses", {}).pop("422", None)
            if keyed and not OPEN_PATHS.fullmatch(path):
                operation["security"] = [{"key": []}]
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    form = schema["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"][
        "schema"
    ]
    for body in (form, components["schemas"]["GenerationRequest"], components["schemas"]["JobRequest"]):
        body["properties"]["n"]["maximum"] = service.max_images
        body["properties"]["steps"]["maximum"] = service.max_steps
        seed = body["properties"]["seed"]
        for kind in seed.get("anyOf", [seed]):
            if "maximum" in kind:
                kind["maximum"] = MAX_SEED  # the framework writes a float, which is one more
        if service.client.info is not None:
            info = service.client.info
            body["properties"]["size"]["enum"] = ["auto", info.size]
    for name in ("GenerationRequest", "JobRequest"):
        _accept_nulls(components["schemas"][name])
    if service.client.info is not None:
        app.openapi_schema = schema
    return schema


def _accept_nulls(body: dict[str, Any]) -> None:
    """Say of every field that may be left out that it may be null."""
    for name, field in body["properties"].items():
        if name in body["required"]:
            continue
        words = {
            key: field.pop(key)
            for key in list(field)
            if key in ("title", "description", "default", "examples")
        }
        kinds = field.pop("anyOf", None) or [dict(field)]
        field.clear()
        field.update(words, anyOf=[*(kind for kind in kinds if kind != {"type": "null"}), {"type": "null"}])


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response
    if error.detail == UNREADABLE:
        return ApiError(400, "the body is not JSON that can be read", code="invalid_json").response
    path = short(quote(request.scope["path"]))
    messages = {404: f"there is no {path}", 405: f"{request.method} is not accepted here"}
    message = messages.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else dict(error.headers or {})
    return ApiError(error.status_code, message, code=code, headers=headers).response


def _allowed(request: Request) -> str:
    """The methods that a path has; the framework knows those of one route only."""
    methods: set[str] = set()
    for path, operations in request.app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), request.url.path):
            methods |= {method.upper() for method in operations}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods)) or "GET"


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found[0]["loc"] == ("body",):  # no field of it: the body as a whole
        wrong = wrong_type(request, "application/json")
        return (wrong or ApiError(400, "the body is not a JSON object", code="invalid_json")).response
    return _first_error(found).response


def wrong_type(request: Request, accepted: str) -> ApiError | None:
    """The error of a body of another type: curl, for instance, says form where it is not told."""
    given = request.headers.get("content-type", "none").partition(";")[0]
    if given.strip().lower() == accepted:
        return None
    message = f"the body's Content-Type is {short(given)!r}: accepted is {accepted!r}"
    return ApiError(400, message, code="unsupported_content_type")


def short(text: str) -> str:
    """A text of the client's as a message names it."""
    return text if len(text) <= 100 else text[:100] + "…"


def _first_error(errors: Any) -> ApiError:
    """The first of pydantic's errors in one line."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = short(place[0]) if place else None  # bodies are flat; the rest is a kind of value
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no parameter {param!r}", param=param, code="unknown_parameter")
    text = first["msg"][:1].lower() + first["msg"][1:]
    if param == "prompt" and first["type"] in ("string_too_short", "string_pattern_mismatch"):
        text = "the prompt is empty: say in words what to draw or change"
        return ApiError(400, text, param=param, code="invalid_prompt")
    given = first.get("input")
    if isinstance(given, str | int | float) and len(str(given)) <= 40:
        subject = f"{param} is {given!r}"
    else:
        subject = str(param)
    message = f"{subject}: {text}"
    return ApiError(400, message, param=param, code="invalid_value")


def _blip3o_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Blip3oError)
    return api_error(error).response


def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    return ApiError(
        500, "the server made a mistake: its log says which", "server_error", code="internal_error"
    ).response
