#!/usr/bin/env bash
# Distil from a CSV file of images and captions, export the student as an INT8 bundle, and verify the bundle.
#   PAIRS=pairs.csv TEACHER=local-dir:quickstart/teacher/student bash examples/distil_your_own_pairs.sh
set -euo pipefail
PAIRS=${PAIRS:?a CSV with the columns filepath,title}
TEACHER=${TEACHER:?such as ViT-B-16 (then set TEACHER_PRETRAINED, too), hf-hub:ORG/REPO or local-dir:PATH}
OUT=${OUT:-runs/mine}

clip-rd-edge distill --data "$PAIRS" --teacher "$TEACHER" \
    ${TEACHER_PRETRAINED:+--teacher-pretrained "$TEACHER_PRETRAINED"} \
    --student "${STUDENT:-resnet18}" --image-size "${IMAGE_SIZE:-224}" --text "${TEXT:-small}" \
    --batch-size "${BATCH_SIZE:-64}" --epochs "${EPOCHS:-32}" --resume -o "$OUT"
clip-rd-edge export "$OUT" --precision int8 --force -o "$OUT/bundle"
clip-rd-edge verify "$OUT/bundle"
