#!/usr/bin/env bash
# What other projects' clients and libraries say of ours, each in a virtual environment of its own:
#
#     tests/oracles.sh FOLDER          # about a gigabyte, some minutes
#     . FOLDER/env; make test          # or: python -m pytest tests/test_serving_rpc.py ...
#
# Without it the tests that need one of them are skipped, with its name.
set -euo pipefail

folder=$(realpath -m "${1:?usage: tests/oracles.sh FOLDER}")
python=${PYTHON:-python3}

make_venv() { # name, packages...
    local venv=$folder/$1
    shift
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$@"
}

# Two of their clients bring message classes that collide in one process, not in one environment.
make_venv clients 'tritonclient[http,grpc]==2.73.0' 'kserve==0.21.0'
make_venv mlserver 'mlserver==1.7.1' 'onnxruntime>=1.31,<1.32'
make_venv oracles 'model-signing==1.1.1' pyopenssl 'cyclonedx-python-lib[validation]==11.12.0' \
    'lime==0.2.0.1' 'river==0.26.1'
# Captum runs with the torch of the tests.
"$folder/oracles/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    --target "$folder/captum" 'captum==0.9.0'

cat >"$folder/env" <<END
export FEDWARD_CLIENTS_PYTHON=$folder/clients/bin/python
export FEDWARD_MLSERVER_PYTHON=$folder/mlserver/bin/python
export FEDWARD_ORACLES_PYTHON=$folder/oracles/bin/python
export FEDWARD_CYCLONEDX_PYTHON=$folder/oracles/bin/python
export FEDWARD_MODEL_SIGNING=$folder/oracles/bin/model_signing
export PYTHONPATH=\${PYTHONPATH:+\$PYTHONPATH:}$folder/captum
END
echo "now: . $folder/env"
