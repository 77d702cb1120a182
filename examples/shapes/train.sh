#!/bin/sh
# Trains the embedded model from nothing, or goes on where a killed run stopped: train.sh RUN_FOLDER
# The autoencoder's decoder and the joint stage share the machine; each runs on one thread.
# AUTOENCODER, IMAGE_TOKENIZER and JOINT hold further options of the stages. A stage that measures less than the
# next one needs ends it with an error.
set -eu
run=$1
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=${PYTHON:-python}
mkdir -p "$run"
# shellcheck disable=SC2086  # the options are several words
$python -m examples.shapes.train_autoencoder --run "$run" ${AUTOENCODER:-} >>"$run/autoencoder.out" 2>&1 &
autoencoder=$!
trap '[ -z "$autoencoder" ] || kill "$autoencoder" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
$python -m examples.shapes.train_image_tokenizer --run "$run" ${IMAGE_TOKENIZER:-} \
    >>"$run/image_tokenizer.out" 2>&1
# The joint stage waits for the encoder, so the stage that makes it must be alive or done.
if ! kill -0 "$autoencoder" 2>/dev/null; then
    wait "$autoencoder"
    autoencoder=
fi
$python -m examples.shapes.train_joint --run "$run" ${JOINT:-} >>"$run/joint.out" 2>&1
[ -z "$autoencoder" ] || wait "$autoencoder"
autoencoder=
$python -m examples.shapes.evaluate --run "$run"
$python -m examples.shapes.export --run "$run" --out "$run/export"
