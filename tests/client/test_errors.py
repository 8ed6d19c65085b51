"""The exception tree and how errors of gRPC become exceptions of it."""

import inspect
import re

import grpc
import pytest

import vflow_client
from tests.client.fake_service import FakeService, Refusal
from vflow_client import errors
from vflow_client.v1.errors_pb2 import ErrorReason


def fail(client: vflow_client.Client, service: FakeService, refusal: Refusal) -> vflow_client.VFlowError:
    service.refusals["GetSession"] = [refusal] * 3
    with pytest.raises(vflow_client.VFlowError) as caught:
        client.attach("sessions/x").state()
    return caught.value


def test_every_reason_of_the_contract_has_a_class() -> None:
    assert set(errors.CLASS_OF_REASON) == set(ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        if match := re.match(r"^ {4}((?:[│├└─]+ +|    )*(?:[├└]── )?)([A-Z]\w+)  ", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            drawn[match[2]] = path[depth - 1] if depth else "Exception"
        elif match := re.match(r"^ {4}((?:[│├└─ ]{4})+)([A-Z]\w+)$", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            drawn[match[2]] = path[depth - 1]
    real = {
        name: cls.__base__.__name__
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.VFlowError) and cls.__base__ is not None
    }
    assert drawn == real


def test_details_are_read(client: vflow_client.Client, service: FakeService) -> None:
    error = fail(
        client,
        service,
        Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "OPTION_OUT_OF_RANGE",
            metadata={"field": "options.top_p", "max": "1"},
            fields={"options.top_p": "must be at most 1"},
            retry_after=2.5,
        ),
    )
    assert type(error) is vflow_client.OptionOutOfRange
    assert error.reason == "OPTION_OUT_OF_RANGE" and error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.metadata == {"field": "options.top_p", "max": "1"}
    assert error.fields == {"options.top_p": "must be at most 1"}
    assert error.retry_after == 2.5
    assert str(error) == "OPTION_OUT_OF_RANGE: refused on purpose"


@pytest.mark.parametrize(
    ("code", "kind"),
    [*errors.CLASS_OF_CODE.items(), (grpc.StatusCode.DATA_LOSS, vflow_client.VFlowError)],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", None)),
)
def test_without_details_the_status_code_decides(
    client: vflow_client.Client, service: FakeService, code: grpc.StatusCode, kind: type[vflow_client.VFlowError]
) -> None:
    error = fail(client, service, Refusal(code))
    assert type(error) is kind and error.reason is None and error.code is code
    assert str(error) == f"{code.name}: bare refusal"


def test_a_reason_of_a_newer_service_falls_back_to_its_status_code(
    client: vflow_client.Client, service: FakeService
) -> None:
    error = fail(client, service, Refusal(grpc.StatusCode.NOT_FOUND, "MOON_NOT_FOUND"))
    assert type(error) is vflow_client.NotFound and error.reason == "MOON_NOT_FOUND"


def test_reasons_of_another_domain_are_not_ours(client: vflow_client.Client, service: FakeService) -> None:
    error = fail(client, service, Refusal(grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND", domain="proxy.example"))
    assert type(error) is vflow_client.NotFound and error.reason is None


def test_a_message_that_grpc_refuses_is_explained(client: vflow_client.Client) -> None:
    with pytest.raises(vflow_client.ResourceExhausted, match=r"larger than max.*--max-message-bytes"):
        client.attach("sessions/one").add_image(bytes(5 << 20))  # gRPC takes 4 MiB where nobody says otherwise
