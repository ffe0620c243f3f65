#!/bin/sh
# Makes the virtual environments of the peers: `benchmarks/peers/setup.sh FOLDER [PEER...]`.
# One that cannot be installed is reported, and the benchmark goes on without it.
set -u
folder=${1:?"usage: setup.sh FOLDER [pfl] [nvflare] [ray]"}
shift
[ $# -gt 0 ] || set -- pfl nvflare
torch="torch --index-url https://download.pytorch.org/whl/cpu"
python=${PYTHON:-python3.11}
for peer in "$@"; do
    "$python" -m venv "$folder/$peer" || { echo "$peer: no virtual environment"; continue; }
    pip="$folder/$peer/bin/pip --quiet --disable-pip-version-check"
    case $peer in
        pfl) packages="pfl[pytorch]==0.6.0" ;;
        nvflare) packages="nvflare[PT]==2.9.0" ;;
        *) echo "$peer: not a peer"; continue ;;
    esac
    # The build for processors is a tenth of the size; where its index cannot be reached, the usual one.
    $pip install --retries 1 --timeout 20 $torch || $pip install torch || { echo "$peer: torch cannot be installed"; continue; }
    if $pip install "$packages" scikit-learn; then
        echo "$peer: ready in $folder/$peer"
    else
        echo "$peer: cannot be installed"
    fi
done
