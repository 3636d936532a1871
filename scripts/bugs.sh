#!/usr/bin/env bash
# Puts each bug of bugs/ into a copy of the committed tree, one at a time, and runs the test that must catch it.
#
#   scripts/bugs.sh [--write] [--list] [--again] [--kept] [PREFIX...]
#
# PREFIX chooses patches by the beginning of their names (B07, B07-late). --list tells the chosen ones. --write puts the table of the
# run into docs/bug-table.md; nothing else in the tree is changed. Fails if a bug escapes, a patch no longer applies or doesn't
# compile, or a test fails without any bug.
#
# What is cheap to compile comes first. What was caught is kept, and not run again while neither the patch nor any code has changed:
# a run that was interrupted goes on where it was. --again forgets it; --kept runs nothing, and tells only what is kept.
#
# A patch is a unified diff below a head of lines `key: value`:
#   class  of docs/bug-table.md          bug    what it does, in a sentence
#   catch  the command that must fail    test   the test that must be named as failed
#   says   what else must be told        limit  seconds that the command may take (300)
#   make   what must be built before, beside the test itself
set -uo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Where the copy lives; it is kept, so that the next run compiles less.
work=${BUGS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/verdict/bugs}
tree=$work/tree
export CARGO_TARGET_DIR=$work/target CARGO_TERM_COLOR=never CARGO_INCREMENTAL=1
# A failure as it is found will do; to shrink it takes minutes.
export PROPTEST_MAX_SHRINK_ITERS=0

write=
list=
again=
only_kept=
prefixes=()
for argument in "$@"; do
  case $argument in
    --write) write=1 ;;
    --list) list=1 ;;
    --again) again=1 ;;
    --kept) only_kept=1 ;;
    -*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
    *) prefixes+=("$argument") ;;
  esac
done

# field FILE KEY: a line of the head of a patch.
field() { sed -n "/^---/q; s/^$2: //p" "$1"; }

chosen() {
  local patch prefix
  for patch in bugs/*.patch; do
    for prefix in "${prefixes[@]-}"; do
      [[ ${patch##*/} == "$prefix"* ]] && { echo "$patch"; break; }
    done
  done
}

# cost PATCH: how much its command compiles, for the order.
cost() {
  case $(field "$1" catch) in
    *verdict-tests*) echo 5 ;;
    *verdict-coordinator* | *verdict-participant*) echo 4 ;;
    *verdict-raft*) echo 3 ;;
    *verdict-client*) echo 2 ;;
    *verdict-check* | *verdict-sim*) echo 1 ;;
    *) echo 0 ;;
  esac
}

mapfile -t patches < <(chosen | while IFS= read -r patch; do echo "$(cost "$patch") $patch"; done | sort -s -k 1,1n | cut -d ' ' -f 2-)
((${#patches[@]})) || { echo "no patch of bugs/ begins with: ${prefixes[*]}" >&2; exit 2; }

if [[ $list ]]; then
  for patch in "${patches[@]}"; do
    printf '%-50s %s\n' "$(basename "$patch" .patch)" "$(field "$patch" bug)"
  done
  exit
fi

for patch in "${patches[@]}"; do
  for key in class bug catch test; do
    [[ $(field "$patch" $key) ]] || { echo "$patch has no line '$key: ...'" >&2; exit 2; }
  done
done

# The copy: what is committed, with only those files touched that differ, so that cargo compiles no more than it must.
mkdir -p "$tree"
fresh=$(mktemp -d "$work/fresh.XXXXXX")
log=$(mktemp "$work/log.XXXXXX")
# What is edited while this runs doesn't count.
kept=$(mktemp -d "$work/patches.XXXXXX")
cp "${patches[@]}" "$kept"
patches=("${patches[@]/#bugs/$kept}")
undo=
clean_up() {
  [[ -z $undo ]] || (cd "$tree" && git apply -C1 --reverse "$undo" 2> /dev/null)
  rm -rf "$fresh" "$log" "$kept"
}
trap clean_up EXIT
trap 'exit 130' INT TERM
if [[ ! $only_kept ]]; then
  git archive HEAD | tar -x -C "$fresh"
  (cd "$fresh" && find . -type f -o -type l) | sort > "$work/files.new"
  while IFS= read -r file; do
    cmp -s "$fresh/$file" "$tree/$file" || { mkdir -p "$(dirname "$tree/$file")" && cp -P "$fresh/$file" "$tree/$file" && touch -h "$tree/$file"; }
  done < "$work/files.new"
  [[ ! -f $work/files ]] || comm -23 "$work/files" "$work/files.new" | (cd "$tree" && xargs -r -d '\n' rm -f)
  mv "$work/files.new" "$work/files"
  rm -rf "$fresh"
fi

# What was found, by patch and by command: each file begins with what it holds for.
kept_results=$work/results
[[ ! $again ]] || rm -rf "$kept_results"
mkdir -p "$kept_results"

# rests_on COMMAND: the folders whose code it runs.
rests_on() {
  case $1 in
    *-p\ verdict-protocol*) echo protocol ;;
    *-p\ verdict-check*) echo protocol check ;;
    *-p\ verdict-sim\ *) echo protocol sim ;;
    *-p\ verdict-client*) echo protocol proto client ;;
    *-p\ verdict-raft*) echo protocol proto failpoints raft ;;
    *-p\ verdict-participant*) echo protocol proto failpoints raft participant ;;
    *-p\ verdict-coordinator*) echo protocol proto failpoints raft coordinator ;;
    *) echo . ;;
  esac
}

# holds_for COMMAND [PATCH]: a hash of what a result depends on.
holds_for() {
  local folders
  read -ra folders <<< "$(rests_on "$1")"
  { echo "$1"; cat ${2:+"$2"} < /dev/null; git ls-tree -r HEAD "${folders[@]}" |
    grep -vE $'\t(bugs/|docs/|.*\\.md$|scripts/bugs\\.sh$)'; } | sha256sum
}

# known NAME COMMAND [PATCH]: the seconds that are kept under that name, if they hold still.
known() {
  local file=$kept_results/$1
  [[ -f $file && $(head -n 1 "$file") == "$(holds_for "${@:2}")" ]] && tail -n +2 "$file"
}
# keep NAME SECONDS COMMAND [PATCH]
keep() { printf '%s\n' "$(holds_for "${@:3}")" "$2" > "$kept_results/$1"; }

if [[ ! $only_kept ]]; then
  variables=$("$tree/scripts/rocksdb.sh") || exit 1
  eval "$variables"
fi

# run LIMIT COMMAND: in the copy; all it says goes to the log.
run() { (cd "$tree" && GIT_CEILING_DIRECTORIES=$work timeout --kill-after=10 "$1" bash -c "$2") > "$log" 2>&1; }

# build PATCH: compiles what its command needs, so that the limit of time is for the test alone.
build() {
  local make catch
  make=$(field "$1" make)
  catch=$(field "$1" catch)
  [[ -z $make ]] || run 3600 "$make" || return
  [[ $catch != *'cargo test '* ]] || run 3600 "${catch%% -- *} --no-run --locked"
}

# since TIME: seconds.
since() { awk -v from="$1" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.1f", to - from }'; }

# Failing cases that proptest keeps would find the next bug sooner than it is found without them.
forget_cases() {
  (cd "$tree" && find . -path ./target -prune -o -name '*.proptest-regressions' -print) |
    while IFS= read -r file; do grep -qxF "$file" "$work/files" || rm -f "$tree/$file"; done
}

# A test that could not be compiled says nothing about a bug.
compiled() { ! grep -qE '^error(\[E[0-9]+\])?: |could not compile' "$log"; }

# passes PATCH: whether its command passes without any bug; each is run once.
declare -A passes
passes() {
  local catch limit kept started seconds outcome
  catch=$(field "$1" catch)
  [[ ! ${passes[$catch]-} ]] || { [[ ${passes[$catch]} == passes ]]; return; }
  kept=passes-$(sha256sum <<< "$catch" | cut -c 1-16)
  limit=$(field "$1" limit)
  outcome='does not compile'
  if seconds=$(known "$kept" "$catch"); then
    outcome=passes
  elif build "$1"; then
    started=$EPOCHREALTIME
    outcome=fails
    if run "${limit:-300}" "$catch"; then outcome=passes; fi
    seconds=$(since "$started")
  fi
  passes[$catch]=$outcome
  printf '%-10s %6s s  without any bug: %s\n' "$outcome" "${seconds:--}" "$catch"
  if [[ $outcome == passes ]]; then
    keep "$kept" "$seconds" "$catch"
  else
    tail -n 30 "$log"
    return 1
  fi
}

failed=0
table=()
for patch in "${patches[@]}"; do
  name=$(basename "$patch" .patch)
  catch=$(field "$patch" catch)
  test=$(field "$patch" test)
  says=$(field "$patch" says)
  limit=$(field "$patch" limit)
  verdict= seconds=-
  if found=$(known "$name" "$catch" "$patch"); then
    verdict=caught seconds=$found
  elif [[ $only_kept ]]; then
    verdict='not run'
  elif ! passes "$patch"; then
    verdict='FAILS WITHOUT IT'
  elif ! (cd "$tree" && GIT_CEILING_DIRECTORIES=$work git apply -C1 --check "$patch") 2> "$log"; then
    verdict='NO LONGER APPLIES'
  else
    undo=$patch
    (cd "$tree" && GIT_CEILING_DIRECTORIES=$work git apply -C1 "$undo")
    if ! build "$patch"; then
      verdict='DOES NOT COMPILE'
    else
      started=$EPOCHREALTIME
      run "${limit:-300}" "$catch"
      status=$?
      seconds=$(since "$started")
      if ((status == 0)); then
        verdict=ESCAPED
      elif ! compiled && ! grep -q "$test" "$log"; then
        verdict='DOES NOT COMPILE'
      elif ((status == 124 || status == 137)); then
        verdict='TIME IS UP'
      elif ! grep -qE "$test.*(FAILED|panicked)|(FAILED|panicked).*$test" "$log"; then
        verdict="FAILED, BUT NOT BY $test"
      elif [[ $says ]] && ! grep -qF -- "$says" "$log"; then
        verdict="CAUGHT, BUT NOT SAID: $says"
      else
        verdict=caught
      fi
    fi
    (cd "$tree" && GIT_CEILING_DIRECTORIES=$work git apply -C1 --reverse "$undo")
    undo=
    forget_cases
  fi
  printf '%-10s %6s s  %-48s %s\n' "$verdict" "$seconds" "$name" "$test"
  if [[ $verdict == caught ]]; then
    keep "$name" "$seconds" "$catch" "$patch"
  elif [[ $verdict != 'not run' ]]; then
    failed=$((failed + 1))
    tail -n 15 "$log" | sed 's/^/    /'
  fi
  table+=("| $(field "$patch" class) | [$name](../bugs/$name.patch) | $(field "$patch" bug) | \`$test\`${says:+, \`$says\`} | $verdict | $seconds |")
done

rows=$(printf '%s\n' '| class | patch | the bug | caught by | outcome | seconds |' '|---|---|---|---|---|---|' "$(printf '%s\n' "${table[@]}" | sort)")
printf '\n%s\n\n' "$rows"
classes=$(for patch in "${patches[@]}"; do field "$patch" class; done | sort -u | wc -l)
missing=$(grep -c '| not run |' <<< "$rows" || true)
echo "${#patches[@]} bugs of $classes classes, $failed not caught, $missing not run"
if [[ $write ]]; then
  ((${#prefixes[@]} == 0)) || { echo "--write wants a run of all patches" >&2; exit 2; }
  ROWS=$rows awk '/<!-- table: begin -->/ { print; print ENVIRON["ROWS"]; skip = 1 }
    /<!-- table: end -->/ { skip = 0 }
    !skip || /<!-- table: begin -->/ { if (!/<!-- table: begin -->/) print }' docs/bug-table.md > "$log" &&
    cat "$log" > docs/bug-table.md
fi
((failed == 0))
