#!/usr/bin/env bash
# Rules of this code base that no compiler checks. Prints each breach as file:line with what to do, and fails if any.
#
# It looks at all files that git has or would take, in a second or so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

breaches=$(mktemp)
trap 'rm -f "$breaches"' EXIT

# files PATTERN...: those that git has or would take (git's patterns; `:!` excludes), without those just removed.
files() {
  git ls-files -z --cached --others --exclude-standard -- "$@" | sort -zu |
    while IFS= read -r -d '' file; do [[ ! -f $file ]] || printf '%s\0' "$file"; done
}

# rule ADVICE: takes `file:line:text` lines and notes each as a breach.
rule() {
  local file line text
  while IFS=: read -r file line text; do
    printf '%s:%s: %s\n    %s\n' "$file" "$line" "$1" "${text#"${text%%[![:space:]]*}"}"
  done >> "$breaches"
}

# search REGEX PATTERN...: matching lines of those files, as `file:line:text`.
search() {
  local regex=$1
  shift
  files "$@" | xargs -0 -r grep -HnIE -- "$regex" || (($? == 123)) # no match
}

# Lines that are nothing but a comment.
comments='^[^:]*:[0-9]+:[[:space:]]*//'

# Who may know whom. Dependencies point one way.
search '\bopenraft\b' '*.rs' '*/Cargo.toml' ':!raft/' |
  rule 'only raft/ names openraft: use what verdict-raft offers, or extend it'
search '^verdict-' protocol/Cargo.toml |
  rule 'protocol/ depends on no crate of ours: move the code to the crate that depends on it'
search '\bverdict_protocol::(\{.*)?\b(coordinator|leader|shard)\b|^[[:space:]]+(coordinator|leader|shard)::' 'proto/*.rs' 'raft/*.rs' |
  rule "proto/ and raft/ don't know the protocol's machines: only its types"
search '\bverdict[-_]participant\b' coordinator/Cargo.toml 'coordinator/*.rs' |
  { grep -vE "$comments" || true; } |
  rule 'coordinator/ and participant/ never know each other: they speak the stream protocol'
search '\bverdict[-_]coordinator\b' participant/Cargo.toml 'participant/*.rs' |
  { grep -vE "$comments" || true; } |
  rule 'coordinator/ and participant/ never know each other: they speak the stream protocol'

# The protocol is pure: the same events give the same effects, everywhere and always.
search '\bstd::(time|net|fs|thread|env|process)\b|\bInstant\b|\bSystemTime\b|\bHashMap\b|\bHashSet\b|\bHashTable\b|\brand\b|\btokio\b|\basync (fn|move)\b|\.await\b' 'protocol/src/*.rs' ':!protocol/src/point_map.rs' ':!protocol/src/shard/slots.rs' |
  { grep -vE "$comments" || true; } |
  rule 'protocol/ has no clock, randomness, IO, async or unordered map: bring it in as an event, or use BTreeMap or PointMap'
awk '/^\[/ { section = $0 }
  section == "[dependencies]" && /^(rand|tokio|futures|async-trait|uuid|getrandom|chrono|time)[[:space:].=]/ { print FILENAME ":" FNR ":" $0 }' protocol/Cargo.toml |
  rule 'protocol/ depends on nothing that has a clock, randomness, IO or async'

# Left-overs.
search '\b(TO''DO|FIX''ME|X''XX)\b|\b(to''do|unimplemented)!|\bdbg!' '*.rs' '*.proto' '*.py' '*.sh' |
  rule 'finish it, or say in a sentence why it is as it is'
search '#\[ignore\b' '*.rs' |
  rule 'a test that is not run proves nothing: make it run, or remove it'
search '(^|[^[:alnum:]_.~)}-])/(home|root|Users|work|workspace)/[[:alnum:]._~]' '*' ':!LICENSE' ':!Cargo.lock' |
  rule 'a path of one machine: make it relative, or take it from the environment'
search '"/tmp/' '*.rs' |
  rule 'use a tempfile::TempDir: it is unique, and removed even when the test fails'

# Everything in the wire contract has a comment on the line before (or behind it).
files '*.proto' | xargs -0 -r awk '
  FNR == 1 { commented = 0 }
  /^[[:space:]]*\/\// { commented = 1; next }
  /^[[:space:]]*(message|enum|service|rpc|oneof)[[:space:]]/ ||
  /^[[:space:]]*[[:alnum:]_.<>, ]+=[[:space:]]*[0-9]+[[:space:]]*(\[.*\])?;/ {
    if (!commented && !/\/\//) print FILENAME ":" FNR ":" $0
  }
  { commented = 0 }' |
  rule 'say in a comment above it what it is, with its unit and its range'

# Scripts are at least well-formed.
while IFS= read -r -d '' script; do
  { bash -n "$script" 2>&1 || true; } | sed -E 's/^([^:]*): line ([0-9]+): /\1:\2:/' | rule 'bash cannot read this'
  [[ -x $script ]] || echo "$script:1:$(head -n 1 "$script")" | rule 'make it executable: chmod +x, git add --chmod=+x'
done < <(files '*.sh' .ci/run x)

# Links in documents lead somewhere. A link into a file is checked up to the file.
while IFS= read -r -d '' document; do
  # Code blocks are left out, keeping the count of lines.
  awk '/^[[:space:]]*```/ { code = !code; print ""; next } { print code ? "" : $0 }' "$document" |
    { grep -noE '\]\([^)[:space:]]+\)' || true; } |
    while IFS=: read -r line link; do
      to=${link#](}
      to=${to%)}
      to=${to%%#*}
      case $to in
        '' | http://* | https://* | mailto:*) ;;
        /*) [[ -e .$to ]] || printf '%s:%s:%s\n' "$document" "$line" "$to" ;;
        *) [[ -e $(dirname "$document")/$to ]] || printf '%s:%s:%s\n' "$document" "$line" "$to" ;;
      esac
    done | rule 'the link leads nowhere: mend or remove it'
done < <(files '*.md')

if [[ -s $breaches ]]; then
  cat "$breaches" >&2
  printf '\ntidy: %s breaches\n' "$(grep -c '^[^ ]' "$breaches")" >&2
  exit 1
fi
