//! A session's tasks, and whoever calls into it, as coroutines of one thread.
//!
//! ```text
//!   the target ── resume(strand) ──▶ a task's own code ── sleeps ──▶ back to the target
//!                                     Waiters: `take_over`     a notice ends it
//!                                     the ring: `Idle`         a completion or a wake
//!                                     a channel's read         bytes, the end, a hang-up
//! ```
//!
//! A strand that is resumed looks for what ends its sleep, and without it gives its turn back. So
//! [`settle`] can resume all of them until none gets on: then whoever still waits must wait for
//! something that the target has not done. [`settle`] looks once more as the re-checks would that
//! bound every sleep; what those find was never announced, and counts as late in the statistics.

use std::{
    cell::{Cell, RefCell},
    io,
    ptr::NonNull,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack};
use vfio_migration::{Task, internals};
use vfio_migration_uring::sim::Idle;

/// What a strand sleeps in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// The engine's own waits.
    Wait,
    /// The ring.
    Ring,
    /// A channel's read, or a target's own wait.
    Outside,
}

struct Strand {
    name: String,
    /// Not there while it runs.
    coroutine: Option<Coroutine<(), (), ()>>,
    place: Place,
    done: bool,
}

thread_local! {
    static STRANDS: RefCell<Vec<Strand>> = const { RefCell::new(Vec::new()) };
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
    static CURRENT: Cell<Option<NonNull<Yielder<(), ()>>>> = const { Cell::new(None) };
    static PLACE: Cell<Place> = const { Cell::new(Place::Outside) };
    static MOVED: Cell<bool> = const { Cell::new(false) };
    /// Whether sleeps end as if their bound had passed.
    static BOUND: Cell<bool> = const { Cell::new(false) };
    /// Whether short waits end.
    static PATIENCE: Cell<bool> = const { Cell::new(false) };
}

/// A wait that is no net, but part of the work, is not longer.
const SHORT: Duration = Duration::from_millis(100);

/// Gives the turn back. Returns at the strand's next.
pub fn give_way(place: Place) {
    let current = CURRENT.get().expect("only a strand sleeps");
    PLACE.set(place);
    // SAFETY: the yielder lives on the stack of the strand that runs now, which is this one.
    unsafe { current.as_ref() }.suspend(());
    CURRENT.set(Some(current));
}

/// Says that the strand that runs has got on.
pub fn moved() {
    MOVED.set(true);
}

/// Waits for something that another strand, or the target, does.
pub fn wait_for<R>(mut look: impl FnMut() -> Option<R>) -> R {
    loop {
        if let Some(found) = look() {
            moved();
            return found;
        }
        give_way(Place::Outside);
    }
}

/// Begins a run: takes over this thread's sleeps.
pub fn begin() {
    internals::take_over(Some(Rc::new(|notified, bound| {
        loop {
            give_way(Place::Wait);
            if notified() {
                moved();
                return false;
            }
            if BOUND.get() {
                return true;
            }
            // Short waits end by themselves where nothing else goes on.
            if bound <= SHORT && PATIENCE.get() {
                moved();
                return true;
            }
        }
    })));
}

/// What the ring of a run does instead of sleeping.
#[must_use]
pub fn idle() -> Idle {
    Idle(Arc::new(|fresh, bound| {
        if fresh {
            moved();
        }
        give_way(Place::Ring);
        let short = bound <= SHORT && PATIENCE.get();
        if short {
            moved();
        }
        short || BOUND.get()
    }))
}

/// Ends a run. All strands have ended.
pub fn end() {
    internals::take_over(None);
    STRANDS.with_borrow_mut(|strands| {
        for strand in strands.drain(..) {
            assert!(strand.done, "{} never ended", strand.name);
        }
    });
}

/// Adds a strand, and lets it run up to its first sleep.
pub fn spawn(name: String, body: impl FnOnce() + 'static) -> usize {
    let stack = STACKS
        .with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| DefaultStack::new(256 << 10).expect("memory for a stack"));
    let coroutine = Coroutine::with_stack(stack, move |yielder, ()| {
        CURRENT.set(Some(NonNull::from(yielder)));
        body();
    });
    let at = STRANDS.with_borrow_mut(|strands| {
        strands.push(Strand {
            name,
            coroutine: Some(coroutine),
            place: Place::Outside,
            done: false,
        });
        strands.len() - 1
    });
    resume(at);
    at
}

/// Runs a session's task as a strand.
///
/// # Errors
///
/// None.
pub fn spawn_task(task: Task) -> io::Result<()> {
    spawn(task.kind().to_string(), move || task.run());
    Ok(())
}

/// How many strands there have been in this run.
#[must_use]
pub fn count() -> usize {
    STRANDS.with_borrow(Vec::len)
}

/// Where the strand of this name sleeps; `None` where it has ended, or never was.
#[must_use]
pub fn place(name: &str) -> Option<Place> {
    STRANDS.with_borrow(|strands| {
        let strand = strands.iter().find(|strand| strand.name == name)?;
        (!strand.done).then_some(strand.place)
    })
}

/// Whether a strand has ended.
#[must_use]
pub fn is_done(at: usize) -> bool {
    STRANDS.with_borrow(|strands| strands[at].done)
}

/// The strands that have not ended, for a message.
#[must_use]
pub fn sleeping() -> Vec<(String, Place)> {
    STRANDS.with_borrow(|strands| {
        let sleeping = strands.iter().filter(|strand| !strand.done);
        sleeping
            .map(|strand| (strand.name.clone(), strand.place))
            .collect()
    })
}

/// Gives a strand its turn. Returns whether it got on.
pub fn resume(at: usize) -> bool {
    let taken = STRANDS.with_borrow_mut(|strands| strands[at].coroutine.take());
    let Some(mut coroutine) = taken else {
        return false;
    };
    let outer = CURRENT.take();
    let moved = MOVED.replace(false);
    let ended = matches!(coroutine.resume(()), CoroutineResult::Return(()));
    CURRENT.set(outer);
    let got_on = MOVED.replace(moved) || ended;
    if ended {
        STACKS.with_borrow_mut(|stacks| stacks.push(coroutine.into_stack()));
        STRANDS.with_borrow_mut(|strands| strands[at].done = true);
    } else {
        STRANDS.with_borrow_mut(|strands| {
            strands[at].coroutine = Some(coroutine);
            strands[at].place = PLACE.get();
        });
    }
    got_on
}

/// How many turns all strands together may take to settle: no run comes near it.
const TURNS: usize = 1 << 20;

/// Resumes all strands until none gets on; `between` does what the target does all the while, and
/// says whether that was anything.
pub fn settle(mut between: impl FnMut() -> bool) {
    let mut turns = 0;
    loop {
        let mut any = between();
        // Not an iterator: a strand may spawn others.
        let mut at = 0;
        while at < count() {
            any |= resume(at);
            at += 1;
            turns += 1;
        }
        if !any {
            // Nobody gets on: then time does.
            PATIENCE.set(true);
            for at in 0..count() {
                any |= resume(at);
            }
            PATIENCE.set(false);
        }
        if !any {
            break;
        }
        assert!(turns < TURNS, "it never settles: {:?}", sleeping());
    }
}

/// Ends every sleep once, as its bound would, and lets all settle again. Late wake-ups show in the
/// session's statistics.
pub fn pass_bounds(between: impl FnMut() -> bool) {
    BOUND.set(true);
    for at in 0..count() {
        resume(at);
    }
    BOUND.set(false);
    settle(between);
}

/// Calls what ends a run on a strand of its own, while `drain` drains what it waits for.
pub fn ended<T: 'static>(end: impl FnOnce() -> T + 'static, drain: impl Fn() -> bool) -> T {
    let place = Rc::new(RefCell::new(None));
    let result = place.clone();
    spawn("joining".into(), move || *result.borrow_mut() = Some(end()));
    settle(drain);
    let result = place.borrow_mut().take();
    result.unwrap_or_else(|| panic!("it never ends: {:?}", sleeping()))
}
