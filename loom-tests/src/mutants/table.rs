//! The mutants that no rule finds, and the survivors with their reasons.

use super::{Explained, HandWritten};

const fn mutant(
    module: &'static str,
    name: &'static str,
    find: &'static str,
    replace: &'static str,
) -> HandWritten {
    HandWritten {
        module,
        name,
        find,
        replace,
    }
}

/// Each is one fault that a person could write.
pub(super) const HAND_WRITTEN: &[HandWritten] = &[
    // The slot.
    mutant(
        "slot",
        "publish swaps",
        ".compare_exchange(from.0, ready.0, Release, Relaxed)",
        ".swap(ready.0, Release).checked_add(0).ok_or(0)",
    ),
    mutant(
        "slot",
        "take swaps",
        ".compare_exchange(seen.0, seen.taken().0, Acquire, Relaxed)",
        ".swap(seen.taken().0, Acquire).checked_add(0).ok_or(0)",
    ),
    mutant(
        "slot",
        "publish takes a drained slot",
        "self.exchange(Word::EMPTY, packet)",
        "match self.exchange(Word::EMPTY, packet) {
            Publish::Duplicate(packet) => self.exchange(Word::DRAINED, packet),
            other => other,
        }",
    ),
    mutant(
        "slot",
        "publish_rest takes an empty slot",
        "self.exchange(Word::DRAINED, packet)",
        "self.exchange(Word::EMPTY, packet)",
    ),
    mutant(
        "slot",
        "take forgets that more follows",
        "Self(Phase::Taken as u64 | self.0 & Self::MORE)",
        "Self(Phase::Taken as u64)",
    ),
    mutant(
        "slot",
        "close only looks",
        "Word(self.word.swap(Word::CLOSED.0, Acquire))",
        "Word(self.word.load(Acquire))",
    ),
    mutant(
        "slot",
        "close looks and then stores",
        "Word(self.word.swap(Word::CLOSED.0, Acquire))",
        "Word(self.word.load(Acquire)); self.word.store(Word::CLOSED.0, Relaxed)",
    ),
    mutant(
        "slot",
        "a closed slot is not ready",
        "            Phase::Ready | Phase::Closed\n",
        "            Phase::Ready\n",
    ),
    // The pool.
    mutant(
        "pool",
        "push leaves the tag",
        "head.tag().wrapping_add(1)",
        "head.tag()",
    ),
    mutant(
        "pool",
        "pop swaps",
        ".compare_exchange_weak(head.0, new.0, Relaxed, Acquire)",
        ".swap(new.0, Relaxed).checked_add(0).ok_or(0)",
    ),
    mutant(
        "pool",
        "push swaps",
        ".compare_exchange_weak(head.0, new.0, Release, Relaxed)",
        ".swap(new.0, Release).checked_add(0).ok_or(0)",
    ),
    mutant(
        "pool",
        "reserve swaps",
        ".compare_exchange(0, 1, Acquire, Relaxed)",
        ".swap(1, Acquire).checked_add(0).ok_or(0)",
    ),
    mutant(
        "pool",
        "unhold looks and then stores",
        "let before = self.buffers[index as usize].holders.fetch_sub(1, AcqRel);",
        "let holders = &self.buffers[index as usize].holders;
        let before = holders.load(Acquire);
        holders.store(before - 1, Release);",
    ),
    mutant(
        "pool",
        "unhold frees one too early",
        "before == 1 && index",
        "before <= 2 && index",
    ),
    mutant(
        "pool",
        "a cutter starts again under one lease",
        "holders.load(Acquire) == 1",
        "holders.load(Acquire) <= 2",
    ),
    mutant(
        "pool",
        "a cutter starts again whoever holds",
        "holders.load(Acquire) == 1",
        "true",
    ),
    mutant(
        "pool",
        "a lease takes no hold",
        "                holders.fetch_add(1, Relaxed);\n",
        "",
    ),
    mutant(
        "pool",
        "a released cutter keeps its hold",
        "        if let Some(current) = self.current.take() {
            self.pool.unhold(current.buffer);
        }",
        "        self.current.take();",
    ),
    // The table.
    mutant(
        "table",
        "a retired segment is freed at once",
        "unsafe { guard.defer_destroy(head) };",
        "unsafe { drop(head.into_owned()) };",
    ),
    mutant(
        "table",
        "a retired segment is never freed",
        "unsafe { guard.defer_destroy(head) };",
        "",
    ),
    mutant(
        "table",
        "retire swaps",
        ".exchange(head, next, Release, Relaxed, guard)",
        ".to.swap(next, AcqRel, guard).is_null().then_some(()).xor(Some(())).ok_or(())",
    ),
    mutant(
        "table",
        "retire does not ask whether all are taken",
        "if segment.remaining.load(Acquire) != 0 {",
        "if false {",
    ),
    mutant(
        "table",
        "finish looks and then stores",
        "if segment.remaining.fetch_sub(1, AcqRel) == 1 {",
        "let left = segment.remaining.load(Acquire);
        segment.remaining.store(left - 1, Release);
        if left == 1 {",
    ),
    mutant(
        "table",
        "finish retires one too early",
        "if segment.remaining.fetch_sub(1, AcqRel) == 1 {",
        "if segment.remaining.fetch_sub(1, AcqRel) <= 2 {
            segment.remaining.store(0, Relaxed);",
    ),
    mutant(
        "table",
        "close leaves no mark",
        "                Shared::null().with_tag(CLOSED),",
        "                Shared::null(),",
    ),
    mutant(
        "table",
        "a link is stored",
        "let linked = Owned::new(Self::new(base));",
        "let linked = Owned::new(Self::new(base)).into_shared(guard);
            self.next.to.store(linked, Release);
            return unsafe { linked.as_ref() }.map(Self::visited);
            #[allow(unreachable_code)]
            let linked = Owned::new(Self::new(base));",
    ),
    mutant(
        "table",
        "a dropped table forgets its segments",
        "            link = segment.into_box().next.to;",
        "            std::mem::forget(segment.into_box());
            return;",
    ),
    // The reorder buffer and its reader.
    mutant(
        "reorder_buffer",
        "a ringer takes back what the I/O thread waits for",
        "self.starved.load(Relaxed) == u64::from(index)",
        "self.starved.swap(NONE, Relaxed) == u64::from(index)",
    ),
    mutant(
        "reorder_buffer",
        "admit swaps",
        ".compare_exchange_weak(seen, grown.0, Relaxed, Relaxed)",
        ".swap(grown.0, Relaxed).checked_add(0).ok_or(0)",
    ),
    mutant(
        "reorder_buffer",
        "admit does not compare a config with the highest",
        "if highest > index {",
        "if false {",
    ),
    mutant(
        "reorder_buffer",
        "the I/O thread does not say what it waits for",
        "reorder.starved.store(self.next.into(), Relaxed);",
        "",
    ),
    mutant(
        "reorder_buffer",
        "the I/O thread says only once what it waits for",
        "                    self.starved = false;\n",
        "",
    ),
    mutant(
        "reorder_buffer",
        "the second look is left out",
        "            Some(slot) => slot.is_ready(),",
        "            Some(_) => false,",
    ),
    mutant(
        "reorder_buffer",
        "the second look forgets the closing",
        "            None => reorder.table.is_closed(guard),",
        "            None => false,",
    ),
    mutant(
        "reorder_buffer",
        "take forgets the closing",
        "            None if reorder.table.is_closed(guard) => Take::Closed,\n",
        "",
    ),
    mutant(
        "reorder_buffer",
        "take does not pass on what is next",
        "reorder.next.store(self.next.into(), Relaxed);",
        "",
    ),
    mutant(
        "reorder_buffer",
        "a channel does not say what it waits for",
        "self.awaited.fetch_min(index.into(), Relaxed);",
        "",
    ),
    mutant(
        "reorder_buffer",
        "a channel hides what another waits for",
        "self.awaited.fetch_min(index.into(), Relaxed);",
        "self.awaited.store(index.into(), Relaxed);",
    ),
    mutant(
        "reorder_buffer",
        "a channel is told of its own idx alone, not of those behind it",
        "reorder.awaited.load(Relaxed) > u64::from(self.next)",
        "reorder.awaited.load(Relaxed) != u64::from(self.next)",
    ),
    // The queue.
    mutant(
        "send_queue",
        "a ticket is swapped",
        ".compare_exchange(ticket, ticket + 1, Relaxed, Relaxed)",
        ".swap(ticket + 1, Relaxed).checked_add(0).ok_or(0)",
    ),
    mutant(
        "send_queue",
        "a taker believes a head that it loads",
        ".compare_exchange(ticket, ticket, Relaxed, Relaxed)
            .is_ok()",
        ".load(Relaxed) == ticket",
    ),
    mutant(
        "send_queue",
        "publish notifies nobody",
        "self.waiters.notify_one();",
        "",
    ),
    mutant(
        "send_queue",
        "end notifies nobody",
        "Release);
        self.waiters.notify_all();",
        "Release);",
    ),
    mutant(
        "send_queue",
        "end notifies one",
        "Release);
        self.waiters.notify_all();",
        "Release);
        self.waiters.notify_one();",
    ),
    mutant(
        "send_queue",
        "close notifies nobody",
        "self.table.close(guard, abandon);
        self.waiters.notify_all();",
        "self.table.close(guard, abandon);",
    ),
    mutant(
        "send_queue",
        "close notifies before it closes",
        "self.table.close(guard, abandon);
        self.waiters.notify_all();",
        "self.waiters.notify_all();
        self.table.close(guard, abandon);",
    ),
    mutant(
        "send_queue",
        "a taker does not look for the end",
        "if self.end.load(Acquire) == u64::from(ticket) {",
        "if false {",
    ),
    mutant(
        "send_queue",
        "a taker does not look for the closing",
        "} else if self.table.is_closed(guard) {",
        "} else if false {",
    ),
    // The turn.
    mutant(
        "turn",
        "take takes what is not free",
        "match self.word.compare_exchange(FREE, HELD, Acquire, Relaxed) {
            Ok(_) => Took::Turn,",
        "match self.word.compare_exchange(FREE, HELD, Acquire, Relaxed) {
            Ok(_) | Err(HELD) => Took::Turn,",
    ),
    mutant(
        "turn",
        "a holder does not look once more",
        "if !reader.is_ready(reorder, &guard) {",
        "if true {",
    ),
    mutant(
        "turn",
        "a holder that was wanted rings for nobody",
        "if !self.give_back() || end == End::Enough {
                return Passed::Ring;",
        "if !self.give_back() {
                return Passed::Done;
            }
            if end == End::Enough {
                return Passed::Ring;",
    ),
    mutant(
        "turn",
        "a turn that is handed over is free",
        "self.word.swap(IO, Release)",
        "self.word.swap(FREE, Release)",
    ),
    mutant(
        "turn",
        "the I/O thread claims what is held",
        "HELD => WANTED,",
        "HELD => IO,",
    ),
    mutant(
        "turn",
        "the I/O thread does not say that it wants the turn",
        "HELD => WANTED,",
        "HELD => return false,",
    ),
    mutant(
        "turn",
        "the I/O thread does not look for packets that are left to it",
        "FREE if ReorderReader::resume(reorder).is_ready(reorder, guard) => Look::Waiting,",
        "FREE if false => Look::Waiting,",
    ),
    mutant(
        "turn",
        "a holder that has written enough does not ring",
        "if !self.give_back() || end == End::Enough {",
        "let given = self.give_back();
            if given && end == End::Enough {
                return Passed::Done;
            }
            if !given {",
    ),
    // The doorbell.
    mutant(
        "doorbell",
        "a ringer does not take the flag back",
        "self.asleep.swap(false, Relaxed)",
        "true",
    ),
    mutant(
        "doorbell",
        "a ringer looks before its fence",
        "        fence(SeqCst);
        // Relaxed: after the fence. The swap only keeps a second ringer from a second wake.
        waits() && self.asleep.load(Relaxed) && self.asleep.swap(false, Relaxed)",
        "        let waits = waits() && self.asleep.load(Relaxed);
        fence(SeqCst);
        waits && self.asleep.swap(false, Relaxed)",
    ),
    mutant(
        "doorbell",
        "the I/O thread says that it sleeps behind its fence",
        "        self.asleep.store(true, Relaxed);
        // Partner: the fence of `ring_if`.
        fence(SeqCst);",
        "        fence(SeqCst);
        self.asleep.store(true, Relaxed);",
    ),
    mutant(
        "doorbell",
        "the I/O thread does not say that it sleeps",
        "self.asleep.store(true, Relaxed);",
        "",
    ),
    mutant(
        "doorbell",
        "the I/O thread does not say that it is awake",
        "        // Relaxed: a ringer that still sees it asleep wakes it once too often.
        self.asleep.store(false, Relaxed);",
        "",
    ),
    // The waiters.
    mutant(
        "waiters",
        "no look under the lock",
        "let before = notices.given;
            if let Some(found) = look() {",
        "let before = notices.given;
            if woken && let Some(found) = look() {",
    ),
    mutant(
        "waiters",
        "notify_all does not go through the lock",
        "lock(&self.lock).given += 1;
            self.condvar.notify_all();",
        "self.condvar.notify_all();",
    ),
    mutant(
        "waiters",
        "notify_one does not go through the lock",
        "let mut notices = lock(&self.lock);
            notices.given += 1;
            notices.passes = count;
            drop(notices);
            self.condvar.notify_one();",
        "self.condvar.notify_one();",
    ),
    mutant(
        "waiters",
        "whoever cannot use what it was told keeps it to itself",
        "if woken {",
        "if false {",
    ),
    mutant(
        "waiters",
        "notify_all notifies one",
        "self.condvar.notify_all();",
        "self.condvar.notify_one();",
    ),
    mutant(
        "waiters",
        "a waiter is not counted",
        "self.waiting.fetch_add(1, Relaxed);",
        "",
    ),
    mutant(
        "waiters",
        "a waiter is counted behind its fence",
        "        self.waiting.fetch_add(1, Relaxed);
        // Partner: the fence of `notify`.
        fence(SeqCst);",
        "        fence(SeqCst);
        self.waiting.fetch_add(1, Relaxed);",
    ),
    mutant(
        "waiters",
        "a notifier counts before its fence",
        "        fence(SeqCst);
        // Relaxed: after the fence.
        self.waiting.load(Relaxed)",
        "        let waiting = self.waiting.load(Relaxed);
        fence(SeqCst);
        waiting",
    ),
    // The flags.
    mutant(
        "flags",
        "set swaps",
        "self.word.fetch_or(flag, AcqRel)",
        "self.word.swap(flag, AcqRel)",
    ),
    mutant(
        "flags",
        "set looks and then stores",
        "let before = self.word.fetch_or(flag, AcqRel);",
        "let before = self.word.load(Acquire);
        self.word.store(before | flag, crate::sync::atomic::Ordering::Release);",
    ),
    mutant(
        "flags",
        "set notifies nobody",
        "self.changed.notify_all();",
        "",
    ),
    mutant(
        "flags",
        "set notifies one",
        "self.changed.notify_all();",
        "self.changed.notify_one();",
    ),
    mutant(
        "flags",
        "set notifies before it sets",
        "let before = self.word.fetch_or(flag, AcqRel);
        self.changed.notify_all();",
        "self.changed.notify_all();
        let before = self.word.fetch_or(flag, AcqRel);",
    ),
    mutant(
        "flags",
        "stop overlooks a quit",
        "            flags if flags & Self::QUIT != 0 => Some(Stop::Quit),\n",
        "",
    ),
    mutant(
        "flags",
        "stop overlooks an exit",
        "            flags if flags & Self::EXIT != 0 => Some(Stop::Exit),\n",
        "",
    ),
    mutant(
        "flags",
        "stop loads twice",
        "match self.word.load(Acquire) {",
        "match if self.has(Self::QUIT) {
            Self::QUIT
        } else {
            self.word.load(Acquire) & !Self::QUIT
        } {",
    ),
    mutant(
        "flags",
        "the wait for the result does not look for a stop",
        "self.stop().map(Err)",
        "None",
    ),
    mutant(
        "flags",
        "the wait for the config does not look for a stop",
        "if let Some(stop) = self.stop() {",
        "if let Some(stop) = None {",
    ),
    mutant(
        "flags",
        "the config comes before a stop",
        "if let Some(stop) = self.stop() {",
        "if let Some(stop) = self.stop().filter(|_| !self.has(Self::CONFIG_READY)) {",
    ),
    mutant(
        "flags",
        "the wait for the end ends with a stop",
        "let look = || self.is_ended().then_some(());",
        "let look = || (self.is_ended() || self.stop().is_some()).then_some(());",
    ),
    // The router.
    mutant(
        "router",
        "a snapshot is freed at once",
        "unsafe { guard.defer_destroy(old) };",
        "drop(unsafe { old.into_owned() });",
    ),
    mutant(
        "router",
        "a change takes no lock",
        "    ) -> bool {
        let _changes = lock(&self.changes);",
        "    ) -> bool {",
    ),
    // The statistics.
    mutant(
        "stats",
        "a snapshot reads the published first",
        "let taken = self.taken.load(Acquire);
        (self.published.get(), taken)",
        "let published = self.published.get();
        (published, self.taken.load(Acquire))",
    ),
];

/// Why a weaker finish edge survives.
const FINISH: &str = "the takers' guards order a segment's end behind their accesses";
/// Why a link's exchange needs no acquire where it succeeds.
const LINK: &str = "it reads the null that the segment was made with, which the walk has acquired";

/// The survivors that are left, by name, each with why. The module's header has the argument.
pub(super) const EXPLAINED: &[Explained] = &[
    ("table: next_or_link: AcqRel to Release", LINK),
    ("table: finish: AcqRel to Relaxed", FINISH),
    ("table: finish: AcqRel to Acquire", FINISH),
    ("table: finish: AcqRel to Release", FINISH),
    ("table: retire: Acquire to Relaxed", FINISH),
    ("table: close: Acquire to Relaxed", LINK),
    (
        "flags: set: AcqRel to Release",
        "the notification's fence is behind it, and makes an acquire of what it read",
    ),
];
