#!/usr/bin/env bash
# Distil from WebDataset shards on two processes. The loss always covers the global batch of 64 pairs, whatever the
# number of processes.
#   SHARDS='shards/{00000..00009}.tar' TEACHER=local-dir:quickstart/teacher/student \
#       bash examples/distil_shards_on_two_processes.sh
set -euo pipefail
SHARDS=${SHARDS:?the shards to train on, as in the comment above}
TEACHER=${TEACHER:?such as local-dir:quickstart/teacher/student}
OUT=${OUT:-runs/shards}

torchrun --standalone --nproc-per-node="${PROCESSES:-2}" -m clip_rd_edge distill \
    --data "$SHARDS" --teacher "$TEACHER" --student "${STUDENT:-mobilevit_xxs}" \
    --image-size "${IMAGE_SIZE:-224}" --text "${TEXT:-small}" \
    --batch-size "${BATCH_SIZE:-64}" --epochs "${EPOCHS:-32}" --resume -o "$OUT"
