#!/usr/bin/env bash
# Keep a week of nightly archives of one folder.
set -euo pipefail

source_dir="${1:?usage: backup.sh SOURCE TARGET}"
target_dir="${2:?usage: backup.sh SOURCE TARGET}"
stamp="$(date +%Y-%m-%d)"

mkdir -p "$target_dir"
tar --create --gzip --file "$target_dir/$stamp.tar.gz" --directory "$source_dir" .
find "$target_dir" -name '*.tar.gz' -mtime +7 -print -delete

if ! gzip --test "$target_dir/$stamp.tar.gz"; then
    echo "archive of $stamp is damaged" >&2
    exit 1
fi
du --human-readable "$target_dir"/*.tar.gz | sort --reverse --human-numeric-sort | head -n 5
