#!/bin/sh
# Trains the embedded model from nothing, or goes on where a killed run stopped: train.sh RUN_FOLDER
# The autoencoder's decoder and the joint stage share the machine; each runs on one thread.
set -eu
run=$1
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=${PYTHON:-python}
mkdir -p "$run"
$python -m examples.shapes.train_autoencoder --run "$run" >"$run/autoencoder.out" 2>&1 &
autoencoder=$!
trap 'kill $autoencoder 2>/dev/null || true' INT TERM
$python -m examples.shapes.train_image_tokenizer --run "$run" >"$run/image_tokenizer.out" 2>&1
$python -m examples.shapes.train_joint --run "$run" >"$run/joint.out" 2>&1
wait $autoencoder
$python -m examples.shapes.export --run "$run" --out "$run/export"
$python -m examples.shapes.evaluate --run "$run"
