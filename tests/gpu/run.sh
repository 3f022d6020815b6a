#!/usr/bin/env bash
# Learns everything about the CUDA path in 510 seconds, on a machine with a GPU that may have no network:
#     bash tests/gpu/run.sh OUT             # results and log in the folder OUT
#     bash tests/gpu/run.sh --dry-run OUT   # every stage on the CPU with tiny sizes, to prove the script
# stages.py beside this has the stages. PYTHON names another Python than python3.
exec "${PYTHON:-python3}" "$(dirname "$0")/run.py" "$@"
