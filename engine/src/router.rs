//! Which device a packet is for: a map that every channel reads for every packet, without a lock, while
//! devices come and go.
//!
//! ```text
//!   map ──▶ [ (idstr, instance) → Arc<T>, sorted ]      a snapshot, never changed
//!               ▲ insert, put: copy, change, exchange; the old one is freed when no
//!                 channel can be looking at it
//! ```
//!
//! A collector frees the snapshots by epochs, and nothing else uses that collector. The devices' slots have
//! another one. With a shared collector nothing would ever be freed: a snapshot that waits to be freed
//! holds its devices, and they would keep the collector, which keeps the snapshot.
//!
//! Channels call [`Router::get`] from any thread. The VMM's threads call the rest, one at a time, behind a
//! lock that no channel touches.
//!
//! # Edges
//!
//! | edge | release side               | acquire side    | what it carries          |
//! |------|----------------------------|-----------------|--------------------------|
//! | map  | [`Router::insert`], [`Router::put`] | [`Router::get`] | the snapshot's contents |
#![expect(unsafe_code, reason = "dereferences an epoch-protected snapshot")]

use std::fmt;

use crossbeam_epoch::{Atomic, Collector, Guard, LocalHandle, Owned};

use crate::sync::{
    Arc, Mutex,
    atomic::Ordering::{Acquire, Release},
    lock,
};

struct Entry<T> {
    idstr: Box<[u8]>,
    instance: u32,
    value: Arc<T>,
}

impl<T> Entry<T> {
    fn key(&self) -> (&[u8], u32) {
        (&self.idstr, self.instance)
    }
}

impl<T> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Self {
            idstr: self.idstr.clone(),
            instance: self.instance,
            value: self.value.clone(),
        }
    }
}

/// A map from (idstr, instance id).
pub struct Router<T> {
    collector: Collector,
    map: Atomic<Vec<Entry<T>>>,
    changes: Mutex<()>,
}

impl<T> Router<T> {
    /// Returns an empty map, whose readers' guards are `collector`'s. No value may hold that.
    #[must_use]
    pub fn new(collector: Collector) -> Self {
        Self {
            collector,
            map: Atomic::new(Vec::new()),
            changes: Mutex::new(()),
        }
    }

    /// Where threads register for guards.
    pub const fn collector(&self) -> &Collector {
        &self.collector
    }

    /// What a thread pins for its guards.
    pub fn register(&self) -> LocalHandle {
        self.collector.register()
    }

    fn snapshot<'g>(&self, guard: &'g Guard) -> &'g [Entry<T>] {
        assert!(
            guard.collector() == Some(&self.collector),
            "a guard of another collector protects nothing here"
        );
        // map edge, acquire side.
        let map = self.map.load(Acquire, guard);
        // SAFETY: the map is never null, and a snapshot that was the map under `guard` is freed
        // only after it.
        unsafe { map.deref() }
    }

    /// The device of that name. Any thread.
    pub fn get(&self, idstr: &[u8], instance: u32, guard: &Guard) -> Option<Arc<T>> {
        let map = self.snapshot(guard);
        let at = map
            .binary_search_by(|entry| entry.key().cmp(&(idstr, instance)))
            .ok()?;
        Some(map[at].value.clone())
    }

    fn replace(&self, map: Vec<Entry<T>>, guard: &Guard) {
        // map edge, release side. What is taken out was put in under the lock, which carries it.
        let old = self.map.swap(Owned::new(map), Release, guard);
        // SAFETY: the swap took it out, under the lock; those who still read it hold guards.
        unsafe { guard.defer_destroy(old) };
    }

    /// Adds a device. Returns whether the name was free.
    #[must_use = "a name that is taken was not added"]
    pub fn insert(&self, idstr: &[u8], instance: u32, value: Arc<T>, guard: &Guard) -> bool {
        self.put(idstr, instance, value, |_taken| false, guard)
    }

    /// Adds a device; in the place of the one that has its name, where `may_replace` says so of that one.
    /// Channels that have looked the old one up may still hold it. Returns whether it was added.
    #[must_use = "a name that is taken was not added"]
    pub fn put(
        &self,
        idstr: &[u8],
        instance: u32,
        value: Arc<T>,
        may_replace: impl FnOnce(&T) -> bool,
        guard: &Guard,
    ) -> bool {
        let _changes = lock(&self.changes);
        let mut map = self.snapshot(guard).to_vec();
        match map.binary_search_by(|entry| entry.key().cmp(&(idstr, instance))) {
            Ok(at) if may_replace(&map[at].value) => map[at].value = value,
            Ok(_taken) => return false,
            Err(at) => {
                let entry = Entry {
                    idstr: idstr.into(),
                    instance,
                    value,
                };
                map.insert(at, entry);
            }
        }
        self.replace(map, guard);
        true
    }

    /// All devices, in the order of their names.
    pub fn all(&self, guard: &Guard) -> Vec<Arc<T>> {
        let map = self.snapshot(guard);
        map.iter().map(|entry| entry.value.clone()).collect()
    }
}

impl<T> Drop for Router<T> {
    fn drop(&mut self) {
        let map = std::mem::replace(&mut self.map, Atomic::null());
        // SAFETY: `&mut self`: nobody else has the map.
        drop(unsafe { map.try_into_owned() });
    }
}

impl<T> fmt::Debug for Router<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_by_both_parts_of_its_name() {
        let collector = Collector::new();
        let handle = collector.register();
        let guard = handle.pin();
        let router = Router::new(collector);
        for (idstr, instance, value) in [("b", 0, 1), ("a", 1, 2), ("a", 0, 3)] {
            assert!(router.insert(idstr.as_bytes(), instance, Arc::new(value), &guard));
        }
        assert!(!router.insert(b"a", 1, Arc::new(9), &guard));
        let get = |idstr: &str, instance| {
            let found = router.get(idstr.as_bytes(), instance, &guard);
            found.map(|value| *value)
        };
        assert_eq!(get("a", 1), Some(2));
        assert_eq!(get("b", 1), None);
        let put = |value, may| router.put(b"a", 1, Arc::new(value), |_| may, &guard);
        assert!(put(4, true) && !put(5, false));
        assert_eq!(get("a", 1), Some(4));
        assert_eq!(get("a", 0), Some(3));
        let all: Vec<_> = router.all(&guard).iter().map(|value| **value).collect();
        assert_eq!(all, [3, 4, 1]);
    }
}
