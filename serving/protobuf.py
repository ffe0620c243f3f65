"""The messages of the Open Inference Protocol's gRPC service, described here in code.

Every client ships them as a generated module, and two of those collide in one process. Ours live
in a pool of their own under a name of their own: on the wire a message has no name.

github.com/kserve/open-inference-protocol, open_inference_grpc.proto; ModelMetadataResponse's
field 6 is left out, on which implementations differ.
"""

from functools import cache
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_PACKAGE = "fedward.oip"
_SCALARS = {
    "double": FieldDescriptorProto.TYPE_DOUBLE,
    "float": FieldDescriptorProto.TYPE_FLOAT,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "uint64": FieldDescriptorProto.TYPE_UINT64,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "uint32": FieldDescriptorProto.TYPE_UINT32,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
}
# Name to "number type name"; `*` repeats, `map` maps a text to an InferParameter.
_MESSAGES: dict[str, tuple[str, ...]] = {
    "Empty": (),
    "ServerLiveResponse": ("1 bool live",),
    "ServerReadyResponse": ("1 bool ready",),
    "ModelReference": ("1 string name", "2 string version"),
    "ModelReadyResponse": ("1 bool ready",),
    "ServerMetadataResponse": ("1 string name", "2 string version", "3 *string extensions"),
    "TensorMetadata": ("1 string name", "2 string datatype", "3 *int64 shape"),
    "ModelMetadataResponse": (
        "1 string name",
        "2 *string versions",
        "3 string platform",
        "4 *TensorMetadata inputs",
        "5 *TensorMetadata outputs",
    ),
    "InferParameter": (
        "1 bool bool_param",
        "2 int64 int64_param",
        "3 string string_param",
        "4 double double_param",
        "5 uint64 uint64_param",
    ),
    "InferTensorContents": (
        "1 *bool bool_contents",
        "2 *int32 int_contents",
        "3 *int64 int64_contents",
        "4 *uint32 uint_contents",
        "5 *uint64 uint64_contents",
        "6 *float fp32_contents",
        "7 *double fp64_contents",
        "8 *bytes bytes_contents",
    ),
    "InferTensor": (
        "1 string name",
        "2 string datatype",
        "3 *int64 shape",
        "4 map parameters",
        "5 InferTensorContents contents",
    ),
    "InferRequestedOutputTensor": ("1 string name", "2 map parameters"),
    "ModelInferRequest": (
        "1 string model_name",
        "2 string model_version",
        "3 string id",
        "4 map parameters",
        "5 *InferTensor inputs",
        "6 *InferRequestedOutputTensor outputs",
        "7 *bytes raw_input_contents",
    ),
    "ModelInferResponse": (
        "1 string model_name",
        "2 string model_version",
        "3 string id",
        "4 map parameters",
        "5 *InferTensor outputs",
        "6 *bytes raw_output_contents",
    ),
}


@cache
def messages() -> dict[str, Any]:
    """The message classes by name."""
    file = FileDescriptorProto(name="fedward/oip.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for line in fields:
            _add_field(message, *line.split())
    pool = DescriptorPool()
    pool.Add(file)
    return {
        name: GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


def _add_field(message: DescriptorProto, number: str, kind: str, name: str) -> None:
    field = message.field.add(name=name, number=int(number))
    field.label = FieldDescriptorProto.LABEL_OPTIONAL
    if kind == "map" or kind.startswith("*"):
        field.label = FieldDescriptorProto.LABEL_REPEATED
    kind = kind.lstrip("*")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
        return
    field.type = FieldDescriptorProto.TYPE_MESSAGE
    if kind == "map":
        # A map is a repeated entry of key and value; protobuf demands this name for it.
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add_field(entry, "1", "string", "key")
        _add_field(entry, "2", "InferParameter", "value")
        field.type_name = f".{_PACKAGE}.{message.name}.{entry.name}"
    else:
        field.type_name = f".{_PACKAGE}.{kind}"
