"""Settles one trade between two users, and meets every kind of answer on the way.

    python settle.py [HOST:PORT]

It reads from top to bottom: the helpers that any client needs, then the trade in `main`. Amounts are integers in the
smallest unit of their asset, written as text: here cents of USDT and satoshis of BTC.
"""

import json
import secrets
import sys
import time

import grpc
from verdict.v1 import settlement_pb2 as api
from verdict.v1 import settlement_pb2_grpc as services
from verdict.v1 import types_pb2 as types

# How long this program tries to get an answer before it gives up, in seconds.
PATIENCE_S = 60
# How long one try may take, in seconds.
TRY_S = 10
# Errors that decided nothing, or say nothing about the decision. The same call again is always safe: a batch takes effect
# once, however often its id is submitted.
TRY_AGAIN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


def uuid7() -> str:
    """A new batch id: a UUIDv7 (RFC 9562), 48 bits of time in milliseconds, then 74 random bits.

    Python has `uuid.uuid7` from 3.14 on. Make the id where the wish to settle arises, and store it before the first try:
    whoever submits again after a crash must use the same one.
    """
    milliseconds = time.time_ns() // 1_000_000
    version, variant = 7, 0b10
    bits = milliseconds << 80 | version << 76 | secrets.randbits(12) << 64 | variant << 62 | secrets.randbits(62)
    text = f"{bits:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def add(partition: str, name: str, delta: int, floor: int | None = None) -> types.Operation:
    """Adds to a balance. Without a floor a balance can't be taken below 0."""
    change = types.Add(delta=str(delta))
    if floor is not None:
        change.floor = str(floor)
    return types.Operation(row=types.Row(partition=partition, name=name), add=change)


def insert(partition: str, name: str, value: bytes) -> types.Operation:
    """Writes a record that must not exist yet."""
    return types.Operation(row=types.Row(partition=partition, name=name), insert=types.Insert(value=value))


def call(method, request):
    """Calls until there is an answer. Errors that won't go away are raised."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            return method(request, timeout=TRY_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() not in TRY_AGAIN:
                raise
            if time.monotonic() > give_up:
                sys.exit(f"no answer within {PATIENCE_S} s: {error.code().name}: {error.details()}")
            time.sleep(0.2)


def submit(settlement: services.SettlementStub, batch: types.Batch) -> types.Outcome:
    """Submits until the outcome is known: COMMITTED or ABORTED. Undecided means: ask again, under the same id."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        outcome = call(settlement.Submit, api.SubmitRequest(batch=batch)).outcome
        if outcome.WhichOneof("result") != "undecided":
            return outcome
        if time.monotonic() > give_up:
            sys.exit(f"no decision about {batch.id} within {PATIENCE_S} s: {outcome.undecided.message}")
        time.sleep(0.2)


def read(settlement: services.SettlementStub, rows: list[types.Row]) -> tuple[int, list[int]]:
    """The position, and the balances at it. All of them are of one and the same moment."""
    response = call(settlement.Read, api.ReadRequest(rows=rows))
    return response.position, [int(value.value.balance) for value in response.values]


def describe(outcome: types.Outcome) -> str:
    """The outcome in one line."""
    if outcome.WhichOneof("result") == "committed":
        return f"COMMITTED, stamp {outcome.committed.stamp}"
    aborted = outcome.aborted
    return f"ABORTED, {types.AbortReason.Name(aborted.reason)}: {aborted.message}"


def expect(what: str, actual, expected) -> None:
    """Ends the program with an error if something is not as it must be."""
    if actual != expected:
        sys.exit(f"{what}: expected {expected!r}, got {actual!r}")


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7400"
    settlement = services.SettlementStub(grpc.insecure_channel(address))

    # New users for each run, so that it can be repeated on the same cluster.
    trade_id = uuid7()
    alice, bob, trade = f"user:alice-{trade_id}", f"user:bob-{trade_id}", f"trade:{trade_id}"
    rows = [types.Row(partition=user, name=asset) for user in (alice, bob) for asset in ("USDT", "BTC")]

    # 1. Money has to come from somewhere: from a treasury that may be overdrawn, because its floor says so. `zero_sum`
    #    makes Verdict refuse the batch unless the deltas of each asset add up to 0.
    overdraft = -(10**30)
    funding = types.Batch(
        id=uuid7(),
        zero_sum=True,
        operations=[
            add("treasury", "USDT", -1_000_000, floor=overdraft),
            add(alice, "USDT", 1_000_000),
            add("treasury", "BTC", -500, floor=overdraft),
            add(bob, "BTC", 500),
        ],
    )
    outcome = submit(settlement, funding)
    print(f"funding    {describe(outcome)}")
    expect("funding", outcome.WhichOneof("result"), "committed")

    # 2. The trade: alice buys 200 satoshis of bob for 600,000 cents; bob pays a fee of 600. Its record is an `Insert`: were
    #    the trade ever submitted under a second id, by mistake, that batch would be aborted.
    batch = types.Batch(
        id=trade_id,
        zero_sum=True,
        operations=[
            add(alice, "USDT", -600_000),
            add(bob, "USDT", 599_400),
            add("exchange", "USDT", 600),
            add(bob, "BTC", -200),
            add(alice, "BTC", 200),
            insert(trade, "record", json.dumps({"buyer": alice, "seller": bob, "price": 3000, "quantity": 200}).encode()),
        ],
    )
    settled = submit(settlement, batch)
    print(f"trade      {describe(settled)}")
    expect("trade", settled.WhichOneof("result"), "committed")

    # 3. Both users at one position: never one of them before the trade and the other one after it.
    position, balances = read(settlement, rows)
    print(f"balances   {balances} at position {position}")
    expect("balances after the trade", balances, [400_000, 200, 599_400, 300])
    expect("the trade is seen at the position", position >= settled.committed.stamp, True)

    # 4. The same id again, as after a lost reply or a crash: the same answer, and no second effect. So for `GetBatch`.
    again = submit(settlement, batch)
    print(f"again      {describe(again)}")
    expect("the same id again", again, settled)
    asked = call(settlement.GetBatch, api.GetBatchRequest(batch_id=trade_id)).outcome
    expect("GetBatch", asked, settled)

    # 5. More than alice has: the batch as a whole does nothing, and the answer says which operation failed, and what it met.
    #    That is an answer like any other, not an error.
    too_much = types.Batch(
        id=uuid7(), zero_sum=True, operations=[add(alice, "USDT", -400_001), add(bob, "USDT", 400_001)]
    )
    outcome = submit(settlement, too_much)
    print(f"too much   {describe(outcome)}")
    expect("too much", outcome.WhichOneof("result"), "aborted")
    expect("its reason", outcome.aborted.reason, types.ABORT_REASON_SHORT_OF_FUNDS)
    expect("its operation", (outcome.aborted.HasField("operation"), outcome.aborted.operation), (True, 0))
    expect("the balance it met", outcome.aborted.met.balance, "400000")

    # 6. A known id with other contents is a mistake of the caller, and refused as an error.
    batch.operations[0].add.delta = "-1"
    batch.operations[1].add.delta = "-599"
    try:
        outcome = call(settlement.Submit, api.SubmitRequest(batch=batch)).outcome
        sys.exit(f"the same id with other contents: expected ALREADY_EXISTS, got {describe(outcome)}")
    except grpc.RpcError as error:
        print(f"other contents under the same id   {error.code().name}: {error.details()}")
        expect("the same id with other contents", error.code(), grpc.StatusCode.ALREADY_EXISTS)

    # 7. None of 4 to 6 changed anything.
    _, balances = read(settlement, rows)
    expect("balances in the end", balances, [400_000, 200, 599_400, 300])
    print("all as expected")


if __name__ == "__main__":
    main()
