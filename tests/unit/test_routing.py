"""Which model a request is for, and what its engine is asked: every kind of route, without a connection."""

import json
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest

from mmd.config import Config, EngineKind, Filters, Model
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.head import RequestHead, RequestParser, ResponseParser
from mmd.gateway.relay.kept import KEPT_MAX, IdFinder, KeptAnswers
from mmd.gateway.relay.routing import ROUTES, find_route

ORG = Model(
    "org/model", "org", EngineKind.VLLM, aliases=("short", "alias/of/it"), lora={"sql": "/srv/sql", "org/xml": "/srv/x"}
)
PLAIN = Model("org", "plain", EngineKind.SIM)
FILTERED = Model(
    "filtered",
    "filtered",
    EngineKind.SIM,
    filters=Filters(strip=("logit_bias", "none"), set={"temperature": 0.2, "extra": {"a": [1, None, {"ü": "é"}]}}),
)
STREAMING = Model("streaming", "streaming", EngineKind.SIM, filters=Filters(set={"stream": True}))
QUIET = Model("quiet", "quiet", EngineKind.SIM, filters=Filters(strip=("stream",)))
PROGRAM = Model("comfy", "comfy", EngineKind.COMMAND)
ELSEWHERE = Model("there", "there", EngineKind.EXTERNAL, model="their-name", endpoint="http://127.0.0.1:9")
CONFIG = Config(models={m.name: m for m in (ORG, PLAIN, FILTERED, STREAMING, QUIET, PROGRAM, ELSEWHERE)})

FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--b--\r\n'
BY_FORM = [
    b"/v1/audio/transcriptions",
    b"/v1/audio/translations",
    b"/v1/audio/voices",
    b"/v1/images/edits",
    b"/v1/images/variations",
]
BY_QUERY = [b"/props", b"/v1/audio/voices", b"/v1/realtime"]
BY_BODY = sorted(ROUTES.keys() - {*BY_FORM, *BY_QUERY})


class Aim(NamedTuple):
    model: Model
    stream: bool
    body: bytes
    target: bytes


def head_of(method: str, target: str, more: str = "") -> RequestHead:
    parser = RequestParser()
    data = f"{method} {target} HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode("latin-1")
    assert parser.parse(data) == len(data)
    return parser.head


def aimed(
    method: str, target: str, body: bytes = b"", *, kept: Mapping[str, str] = MappingProxyType({}), more: str = ""
) -> tuple[Model, bool, bytes, bytes, str]:
    head = head_of(method, target, more)
    route = ROUTES.get(head.path) or find_route(head.path)
    assert route is not None, "not for a model"
    assert head.method in route.methods
    answers = KeptAnswers()
    answers.inherit(kept.items())
    return route.aim(head, body, CONFIG, answers)


def aim(method: str, target: str, body: bytes = b"", *, kept: Mapping[str, str] = MappingProxyType({}), more: str = "") -> Aim:
    return Aim(*aimed(method, target, body, kept=kept, more=more)[:4])


def refused(method: str, target: str, body: bytes = b"", *, more: str = "") -> ApiError:
    with pytest.raises(ApiError) as error:
        aim(method, target, body, more=more)
    return error.value


@pytest.mark.parametrize("path", BY_BODY)
def test_a_document_names_its_model(path: bytes) -> None:
    body = b'{"model" : "org/model", "x": 1.50}'
    assert aim("POST", path.decode(), body) == Aim(ORG, False, body, path), "which passes as it is"
    found = aim("POST", path.decode() + "?api-version=1", b'{"x": 1.50, "model": "short", "stream": true}')
    assert found == Aim(ORG, True, b'{"x":1.50,"model":"org/model","stream":true}', path + b"?api-version=1")


@pytest.mark.parametrize("path", BY_FORM)
def test_a_form_names_its_model(path: bytes) -> None:
    kind = "Content-Type: multipart/form-data; boundary=b\r\n"
    assert aim("POST", path.decode(), FORM % b"org/model", more=kind) == Aim(ORG, False, FORM % b"org/model", path)
    assert aim("POST", path.decode(), FORM % b"short", more=kind) == Aim(ORG, False, FORM % b"org/model", path)


@pytest.mark.parametrize("path", BY_QUERY)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_query_names_its_model(method: str, path: bytes) -> None:
    for query in (b"model=org/model&x=%ff", b"x=a+b&model=org%2Fmodel", b"m%6Fdel=org/model"):
        target = path + b"?" + query
        assert aim(method, target.decode()) == Aim(ORG, False, b"", target), "which passes as it is"


def test_a_query_with_another_name_changes_in_nothing_else() -> None:
    found = aim("GET", "/v1/realtime?a=%ff+x&b&model=short&;c=%2f&=")
    assert (found.model, found.target) == (ORG, b"/v1/realtime?a=%ff+x&b&model=org%2Fmodel&;c=%2f&=")
    assert refused("GET", "/props?model=short&model=org").code == "ambiguous_query"
    assert refused("GET", "/props?models=short").code == "model_required"
    assert refused("GET", "/props").code == "model_required"


@pytest.mark.parametrize(
    ("name", "model", "at_engine"),
    [
        ("org/model", ORG, "org/model"),
        ("short", ORG, "org/model"),
        ("alias/of/it", ORG, "org/model"),
        ("sql", ORG, "sql"),
        ("org/xml", ORG, "org/xml"),
        ("org", PLAIN, "org"),
        ("there", ELSEWHERE, "their-name"),
    ],
)
def test_every_name_reaches_its_model(name: str, model: Model, at_engine: str) -> None:
    found = aim("POST", "/v1/embeddings", json.dumps({"model": name}).encode())
    assert (found.model, json.loads(found.body)) == (model, {"model": at_engine})
    found = aim("GET", f"/v1/realtime?model={name}")
    assert found.model == model
    assert found.target.replace(b"%2F", b"/") == f"/v1/realtime?model={at_engine}".encode()


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b'{"model": }', b'"model"', b"\xff", b"[" * 100000, b'{"a":' * 5000])
def test_a_document_that_is_none_is_refused(body: bytes) -> None:
    assert (refused("POST", "/v1/embeddings", body).status, refused("POST", "/v1/embeddings", body).code) == (
        400,
        "invalid_json",
    )


@pytest.mark.parametrize(
    "body", [b"{}", b'{"model": ""}', b'{"model": null}', b'{"model": 7}', b'{"model": ["org"]}', b'{"Model": "org"}']
)
def test_a_document_without_a_model_is_refused(body: bytes) -> None:
    assert (refused("POST", "/v1/embeddings", body).status, refused("POST", "/v1/embeddings", body).code) == (
        400,
        "model_required",
    )


def test_a_model_that_there_is_not_has_a_nearest_name() -> None:
    for name, near in (("org/modle", "org/model"), ("shrt", "short"), ("sqll", "sql")):
        error = refused("POST", "/v1/completions", json.dumps({"model": name}).encode())
        assert (error.status, error.code) == (404, "model_not_found")
        assert f"did you mean {near!r}?" in error.message


def test_a_name_of_megabytes_is_nobodys_and_takes_no_time() -> None:
    begun = time.monotonic()
    error = refused("POST", "/v1/completions", b'{"model": "%b"}' % (b"org/model " * 1_000_000))
    assert time.monotonic() - begun < 1
    assert error.status == 404
    assert len(error.message) < 400


def test_a_changed_configuration_counts_from_the_next_request_on() -> None:
    head, kept = head_of("POST", "/v1/completions"), KeptAnswers()
    body = b'{"model": "org", "stop": 1}'
    route = ROUTES[head.path]
    assert route.aim(head, body, CONFIG, kept) == (PLAIN, False, body, head.target, "org")
    changed = PLAIN._replace(filters=Filters(strip=("stop",)))
    found = route.aim(head, body, Config(models={"org": changed}), kept)
    assert found == (changed, False, b'{"model":"org"}', head.target, "org")
    with pytest.raises(ApiError):
        route.aim(head, body, Config(), kept)
    assert route.aim(head, body, CONFIG, kept) == (PLAIN, False, body, head.target, "org")


# Filters.


def test_filters_change_what_they_name_and_nothing_else() -> None:
    body = (
        b'{"a": 1.0000000000000000001, "logit_bias": {"1": 2}, "model": "filtered", "temperature": 9, "big": 1e999, '
        b'"u": "\\u00e9\xc3\xa9"}'
    )
    changed = aim("POST", "/v1/completions", body).body
    assert changed == (
        b'{"a":1.0000000000000000001,"model":"filtered","temperature":0.2,"big":1e999,"u":"\\u00e9\xc3\xa9",'
        b'"extra":{"a":[1,null,{"\xc3\xbc":"\xc3\xa9"}]}}'
    )


def test_of_a_field_that_is_given_twice_the_last_counts() -> None:
    """As it does for every engine that reads it."""
    assert json.loads(aim("POST", "/v1/completions", b'{"model": "no", "model": "short", "x": 1, "x": 2}').body) == {
        "model": "org/model",
        "x": 2,
    }


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_a_document_in_another_encoding_is_understood(encoding: str) -> None:
    body = '{"model": "filtered", "logit_bias": 1, "é": NaN}'.encode(encoding)
    assert json.loads(aim("POST", "/v1/completions", body).body)["temperature"] == 0.2
    plain = '{"model": "org", "é": 1}'.encode(encoding)
    assert aim("POST", "/v1/completions", plain) == Aim(PLAIN, False, plain, b"/v1/completions")


@pytest.mark.parametrize(
    ("name", "asked", "stream"),
    [("streaming", "false", True), ("quiet", "true", False), ("filtered", "true", True), ("org", '"true"', False)],
)
def test_whether_an_answer_is_a_stream_is_what_the_engine_is_told(name: str, asked: str, stream: bool) -> None:
    assert aim("POST", "/v1/completions", f'{{"model": "{name}", "stream": {asked}}}'.encode()).stream is stream


# Forms.


def form(*parts: tuple[str, str], boundary: str = "b") -> bytes:
    return (
        b"".join(f"--{boundary}\r\n{head}\r\n\r\n{value}\r\n".encode() for head, value in parts)
        + f"--{boundary}--\r\n".encode()
    )


NAME = 'Content-Disposition: form-data; name="model"'
FILE = 'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'


def form_aim(body: bytes, kind: str = "multipart/form-data; boundary=b") -> Aim:
    return aim("POST", "/v1/audio/transcriptions", body, more=f"Content-Type: {kind}\r\n")


@pytest.mark.parametrize(
    "body",
    [
        form((NAME, "short")),
        form((FILE, "x"), (NAME, "short")),
        form((FILE, "\r\n-\r\n--\r\n--c--\r\n--\r\n"), (NAME, "short")),
        form((FILE, ""), (NAME, "short")),
        form((FILE, "\r\n\r\n"), ("content-disposition:form-data;name=model", "short")),
        form((NAME + "\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit", "short")),
        form(("X-Other: 1\r\nCONTENT-DISPOSITION:   Form-Data ; NAME=model ;", "short"), (FILE, "x")),
        form(('Content-Disposition: form-data; name="file"; filename="a\\"; name=.wav"', "x"), (NAME, "short")),
        form(("Content-Disposition: form-data; name=\"model\"; filename*=utf-8''x", "no model: a file"), (NAME, "short")),
        form(
            ('Content-Disposition: form-data; name="g[]"', "word"),
            ('Content-Disposition: form-data; name="g[]"', "segment"),
            (NAME, "short"),
        ),
        b"a preamble\r\n" + form((NAME, "short")) + b"an epilogue --b",
        b"\r\n" + form((NAME, "short")),
        form((NAME, "short"))[:-2],
    ],
)
def test_a_form_has_its_model_anywhere(body: bytes) -> None:
    found = form_aim(body)
    assert found.model == ORG
    assert found.body == body.replace(b"short\r\n", b"org/model\r\n")


@pytest.mark.parametrize(
    "kind",
    ['multipart/form-data; boundary="b"', "Multipart/Form-Data;charset=utf-8 ; BOUNDARY=b", "multipart/form-data; boundary=b;"],
)
def test_a_content_type_may_be_written_in_other_ways(kind: str) -> None:
    assert form_aim(form((NAME, "short")), kind).model == ORG


@pytest.mark.parametrize(
    ("value", "stream"), [("true", True), ("True", True), ("1", True), ("false", False), ("", False), ("0", False)]
)
def test_a_form_asks_for_a_stream(value: str, stream: bool) -> None:
    asked = 'Content-Disposition: form-data; name="stream"'
    assert form_aim(form((NAME, "org"), (asked, value))).stream is stream


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "no end"),
        (b"--b--\r\n", "model_required"),
        (form((NAME, "")), "model_required"),
        (form((FILE, "model")), "model_required"),
        (form((NAME, "short"))[:-6], "no end"),
        (form((NAME, "short"), (NAME, "org")), "given twice"),
        (form((NAME, "short"), (NAME, "short")), "given twice"),
        (form((NAME, "short")).replace(b"\r\n", b"\n"), "end"),
        (form((NAME, "short")).replace(b"--b--", b"--b--x"), "last boundary"),
        (b"--bx\r\n" + form((NAME, "short")), "end of a line"),
        (form((FILE, "\r\n--bx"), (NAME, "short")), "end of a line"),
        (b"--b \r\n" + form((NAME, "short"))[5:], "end of a line"),
        (b"--b\r\n--b--\r\n", "no head"),
        (b"--b\r\n\r\nshort\r\n--b--\r\n", "head"),
        (form((NAME + "\r\n", "short")).replace(b"\r\n\r\n\r\nshort", b"\r\n\r\n--b--"), "head"),
        (form((NAME + "\r\n ; x=y", "short")), "none"),
        (form((NAME + "\r\n" + NAME, "short")), "twice"),
        (form((NAME + '; name="org"', "short")), "twice"),
        (form((NAME + "; name*=utf-8''org", "short")), "not everybody"),
        (form(('Content-Disposition: form-data; name="mo\\del"', "short")), "not everybody"),
        (form(('Content-Disposition: form-data; name="model', "short")), "make no sense"),
        (form(("Content-Disposition: form-data", "short")), "which field"),
        (form(("Content-Disposition: attachment; name=model", "short")), "which field"),
        (form(("Content-Type: text/plain", "short")), "which field"),
        (form((NAME + "\r\nContent-Transfer-Encoding: base64", "c2hvcnQ=")), "transfer encoding"),
        (form((NAME + "\r\nX: " + "y" * 9000, "short")), "no end"),
        (form(*(('Content-Disposition: form-data; name="x"', ""),) * 1001), "more than 1000 parts"),
    ],
)
def test_a_form_with_no_meaning_or_two_is_refused(body: bytes, why: str) -> None:
    with pytest.raises(ApiError) as error:
        form_aim(body)
    assert error.value.status == 400
    assert why in f"{error.value.code} {error.value.message}"


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=b",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=b; boundary=c",
        'multipart/form-data; boundary="b\\"',
        'multipart/form-data; boundary="b{"',
        "multipart/form-data; boundary=" + "b" * 201,
        "multipart/form-data; boundary=b\r\nContent-Type: multipart/form-data; boundary=c",
    ],
)
def test_what_says_it_is_no_form_is_refused(kind: str) -> None:
    with pytest.raises(ApiError) as error:
        form_aim(form((NAME, "short")), kind)
    assert (error.value.status, error.value.code) == (400, "invalid_form")


# Paths.


@pytest.mark.parametrize(
    ("target", "model", "rest"),
    [
        ("/upstream/comfy/a/b?c=d", PROGRAM, b"/a/b?c=d"),
        ("/upstream/comfy/", PROGRAM, b"/"),
        ("/upstream/comfy/?x", PROGRAM, b"/?x"),
        ("/upstream/comfy//a/.x/%2F?//../x", PROGRAM, b"//a/.x/%2F?//../x"),
        ("/upstream/%63omfy/sleep", PROGRAM, b"/sleep"),
        ("/upstream/there/v1/load_lora_adapter", ELSEWHERE, b"/v1/load_lora_adapter"),
        ("/upstream/org/model/health", ORG, b"/health"),
        ("/upstream/org%2Fmodel/health", ORG, b"/health"),
        ("/upstream/short/metrics", ORG, b"/metrics"),
        ("/upstream/alias/of/it/version", ORG, b"/version"),
        ("/upstream/sql/health", ORG, b"/health"),
        ("/upstream/org/xml/health", ORG, b"/health"),
        ("/upstream/org/health", PLAIN, b"/health"),
    ],
)
def test_a_path_names_its_model_and_the_longest_name_counts(target: str, model: Model, rest: bytes) -> None:
    assert aim("GET", target) == Aim(model, False, b"", rest)


@pytest.mark.parametrize("model", ["comfy", "there"])
@pytest.mark.parametrize(
    "climb",
    [
        "..",
        ".",
        "%2e%2e",
        "%2E.",
        ".%2e",
        "%252e%252e",
        "..;x",
        "..%2Fx",
        "..%5cx",
        "a%2f..",
        "%c0%ae%c0%ae",
        "..%c0%afx",
        "..%20",
    ],
)
def test_no_path_climbs_out_of_where_a_program_was_put(model: str, climb: str) -> None:
    for target in (f"/upstream/{model}/{climb}", f"/upstream/{model}/a/{climb}/b", f"/upstream/{model}//{climb}/?x"):
        with pytest.raises(ApiError) as error:
            aim("GET", target)
        assert (error.value.status, error.value.code) == (400, "invalid_path")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_programs_get_every_method_and_body(method: str) -> None:
    assert aim(method, "/upstream/comfy/sleep", b"{") == Aim(PROGRAM, False, b"{", b"/sleep")


def test_a_path_without_a_model_is_not_found() -> None:
    for target in (
        "/upstream/",
        "/upstream/none/health",
        "/upstream//org/health",
        "/upstream/comfy%2Fx",
        "/upstream/" + "/" * 20000,
    ):
        assert refused("GET", target).code == "model_not_found", target
    assert find_route(b"/upstream") is None


def test_a_page_of_a_program_is_below_its_name() -> None:
    error = refused("GET", "/upstream/%63omfy?a=b")
    assert (error.status, error.headers()["Location"]) == (307, "/upstream/%63omfy/?a=b")
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    assert aim("GET", "/upstream/comfy", more=upgrade).target == b"/"
    assert aim("POST", "/upstream/comfy").target == b"/"


CONTROL = [
    *(
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/start_profile",
        "/stop_profile",
        "/server_info",
    ),
    *(
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/scale_elastic_ep",
        "/abort_requests",
        "/pause",
        "/resume",
        "/slots",
        "/",
    ),
    *(
        "/update_weights",
        "/init_weight_transfer_engine",
        "/reset_mm_cache",
        "/invocations",
        "/docs",
        "/openapi.json",
        "/lora-adapters",
    ),
]


@pytest.mark.parametrize("path", CONTROL)
def test_control_of_an_engine_is_out_of_reach_however_it_is_spelt(path: str) -> None:
    coded = "/" + "".join(f"%{ord(letter):02x}" for letter in path[1:])
    spelt = [
        path,
        path + "/",
        "/" + path,
        "/." + path,
        "/x/.." + path,
        path + ";x",
        path + "?model=org",
        path.upper() + "x",
        coded,
    ]
    spelt += [
        "/v1/chat/completions/.." + path,
        "/v1/responses/.." + path,
        "/v1/responses/..%2f" + path[1:],
        path + "%00",
        "/health" + path,
    ]
    spelt += ["/v1/responses/a/../.." + path, "/v1/responses//cancel/../.." + path, path + "%20", path.replace("/", "%2F")]
    for each in spelt:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            for start in ("/upstream/org", "/upstream/org/model", "/upstream/sql", "http://x/upstream/org"):
                error = refused(method, start + each, b"{}")
                assert error.status == 404, (method, start + each)
        assert ROUTES.get(each.encode()) is None
        found = find_route(each.encode())
        assert found is None or not found.for_workers, "the id of an answer, which has to be known"


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_the_routes_are_open_under_a_models_path_as_well(path: bytes) -> None:
    route = ROUTES[path]
    for method in sorted(route.methods):
        if path in BY_FORM and method == b"POST":
            body, more, wanted = FORM % b"whatever", "Content-Type: multipart/form-data; boundary=b\r\n", FORM % b"org/model"
        else:
            body, more, wanted = (b"{}", "", b'{"model":"org/model"}') if method == b"POST" else (b"", "", b"")
        found = aim(method.decode(), "/upstream/short" + path.decode(), body, more=more)
        assert found == Aim(ORG, False, wanted, path)
    error = refused("PUT", "/upstream/short" + path.decode())
    assert (error.status, error.fields["Allow"]) == (405, ", ".join(sorted(each.decode() for each in route.methods)))


def test_a_document_under_a_models_path_is_for_that_model_or_an_adapter_of_it() -> None:
    for name, at_engine in (("org/model", "org/model"), ("filtered", "org/model"), ("sql", "sql"), ("gpt-4o", "org/model")):
        found = aim("POST", "/upstream/org/model/v1/completions", json.dumps({"model": name, "stream": True}).encode())
        assert (found.model, found.stream, json.loads(found.body)["model"]) == (ORG, True, at_engine)
    found = aim("POST", "/upstream/filtered/v1/completions", b'{"logit_bias": 1}')
    assert json.loads(found.body) == {"model": "filtered", "temperature": 0.2, "extra": {"a": [1, None, {"ü": "é"}]}}
    assert aim("GET", "/upstream/short/v1/realtime?model=x&a=b").target == b"/v1/realtime?model=org%2Fmodel&a=b"


# Answers that engines keep.


@pytest.mark.parametrize(
    ("method", "after"),
    [
        ("GET", ""),
        ("HEAD", ""),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("GET", "/input_items"),
        ("GET", "?stream=true&starting_after=3"),
    ],
)
def test_an_answer_is_asked_for_by_its_id(method: str, after: str) -> None:
    target = f"/v1/responses/resp_1{after}"
    assert aim(method, target, kept={"resp_1": "org"}) == Aim(PLAIN, "stream" in after, b"", target.encode())
    assert aim(method, f"/upstream/org{target}") == Aim(PLAIN, "stream" in after, b"", target.encode()), "its engine knows best"
    assert refused(method, target).status == 404
    assert aim(method, "/v1/responses/resp_1" + after, kept={"resp_1": "org", "resp_2": "filtered"}).model == PLAIN


@pytest.mark.parametrize(
    ("method", "after", "allowed"),
    [("POST", "", "DELETE, GET, HEAD"), ("GET", "/cancel", "POST"), ("DELETE", "/input_items", "GET, HEAD")],
)
def test_what_cannot_be_done_with_an_answer(method: str, after: str, allowed: str) -> None:
    for start in ("", "/upstream/org"):
        error = refused(method, f"{start}/v1/responses/resp_1{after}")
        assert (error.status, error.fields["Allow"]) == (405, allowed)
    assert refused("GET", "/v1/responses/resp_1/other").status == 404
    assert refused("GET", "/v1/responses/resp_1/cancel/").status == 404


def test_of_a_model_whose_engine_has_gone_nothing_is_kept() -> None:
    up = {"m"}
    kept = KeptAnswers(up.__contains__)
    kept.add("resp_1", "m")
    assert kept.find("resp_1") == "m"
    up.clear()
    assert kept.find("resp_1") is None


def test_the_oldest_answers_are_forgotten() -> None:
    kept, told = KeptAnswers(), []
    kept.told = lambda answer, model: told.append((answer, model))
    for number in range(KEPT_MAX + 2):
        kept.add(f"resp_{number}", "m")
    kept.add("resp_2", "n")
    kept.add("resp_new", "m")
    assert [kept.find(f"resp_{number}") for number in (0, 1, 2, 3, 4)] == [None, None, "n", None, "m"]
    assert len(kept.all()) == KEPT_MAX
    assert told[-2:] == [("resp_2", "n"), ("resp_new", "m")]


def test_an_id_is_found_in_an_answer_that_comes_in_pieces() -> None:
    answer = b'data: {"type":"response.created","response":{"previous_response_id":"resp_0","id": "resp_ab-1","o":1}}'
    for cut in range(len(answer)):
        finder = IdFinder()
        found = [finder.feed(answer[:cut]), finder.feed(answer[cut:])]
        assert "resp_ab-1" in found
        assert finder.over
    for nothing in (b'{"error": "x"}', b"x" * 20000, b'{"id": "chatcmpl-1"}', b'{"id": "resp_/../sleep"}'):
        finder = IdFinder()
        assert finder.feed(nothing) is None
        assert finder.over is (len(nothing) > 16384)


# Places.


@pytest.mark.parametrize(
    ("place", "moved"),
    [
        ("/login?x", "/upstream/comfy/login?x"),
        ("/", "/upstream/comfy/"),
        ("http://localhost/a/?b", "/upstream/comfy/a/?b"),
        ("HTTP://localhost", "/upstream/comfy"),
        ("a/b", "a/b"),
        ("?a=b", "?a=b"),
        ("//elsewhere/a", "//elsewhere/a"),
        ("https://localhost:1/a", "https://localhost:1/a"),
        ("https://elsewhere/a", "https://elsewhere/a"),
    ],
)
def test_a_place_that_an_engine_names_is_below_its_path(place: str, moved: str) -> None:
    parser = ResponseParser()
    parser.parse(f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode())
    route = find_route(b"/upstream/")
    assert route is not None
    for target, asked in (("/upstream/comfy/a?b", b"/a?b"), ("/upstream/comfy", b"/"), ("/upstream/comfy/", b"/")):
        assert f"Location: {moved}\r\n".encode() in route.lines(head_of("POST", target), asked, b"localhost", parser.head)
    assert ROUTES[b"/props"].lines(head_of("GET", "/props"), b"/props", b"localhost", parser.head) == parser.head.lines


def test_what_a_client_reaches_is_named() -> None:
    """Keys go by that name: an adapter's where the request can reach nothing else, otherwise the model's own."""
    adapter = next(iter(ORG.lora))
    named = json.dumps({"model": adapter}).encode()
    assert aimed("POST", "/v1/completions", named)[4] == adapter
    assert aimed("GET", f"/v1/realtime?model={adapter}")[4] == adapter
    assert aimed("GET", f"/upstream/{adapter}/v1/models")[4] == ORG.name
    assert aimed("POST", f"/upstream/{adapter}/v1/completions", named)[4] == ORG.name
    assert aimed("GET", "/v1/responses/resp_1", kept={"resp_1": ORG.name})[4] == ORG.name
