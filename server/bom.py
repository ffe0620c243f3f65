"""`bom.cdx.json`: what a release is made of, as a CycloneDX 1.6 bill of materials.

cyclonedx.org/docs/1.6/json. The model is its subject, with digests of its files and what a model
card of this form can hold; the libraries that trained it are its components.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from fedward import __version__
from fedward.core.canonical import digest, digest_json
from fedward.core.fields import INPUT, OUTPUT, ModelSignature

# Any fixed one: equal content then has an equal serial number.
_NAMESPACE = uuid.UUID("6f4a6c1e-3c39-5d0c-9a55-2b8f6d3a7e10")


def bill_of_materials(
    signature: ModelSignature, files: Mapping[str, bytes], *, training: Mapping[str, Any]
) -> dict[str, Any]:
    """The bill of a release.

    Args:
        signature: The model's interface, name and version.
        files: The release's other files.
        training: `training.json`'s value; `versions`, library to version, is used if there.
    """
    label = f"{signature.model}@{signature.version}"
    versions = training.get("versions") or {}
    libraries = {"fedward": __version__, **{str(k): str(v) for k, v in dict(versions).items()}}
    model = {
        "type": "machine-learning-model",
        "bom-ref": label,
        "name": signature.model,
        "version": str(signature.version),
        "description": f"Probability of: {signature.outcome}",
        "hashes": [{"alg": "SHA-256", "content": digest(files["model.onnx"])}],
        "modelCard": {
            "modelParameters": {
                "task": signature.task,
                "inputs": [{"format": f"{INPUT}: float32 of {len(signature.fields)} fields"}],
                "outputs": [{"format": f"{OUTPUT}: float32"}],
            },
            "considerations": {
                "users": ["clinicians"],
                "technicalLimitations": ["see card.html of the release"],
            },
        },
        "components": [
            {
                "type": "file",
                "bom-ref": f"{label}/{path}",
                "name": path,
                "hashes": [{"alg": "SHA-256", "content": digest(content)}],
            }
            for path, content in sorted(files.items())
        ],
    }
    components = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
        }
        for name, version in sorted(libraries.items())
    ]
    content = {"metadata": {"component": model}, "components": components}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest_json(content))}",
        "version": 1,
        **content,
        "dependencies": [
            {"ref": label, "dependsOn": [component["bom-ref"] for component in components]}
        ],
    }
