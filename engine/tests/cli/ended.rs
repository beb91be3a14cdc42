//! What a process has said at its end.

use crate::command::Ended;

impl Ended {
    pub fn json(&self) -> serde_json::Value {
        assert_eq!(self.status, Some(0), "{self:?}");
        crate::schema::object(&self.stdout)
    }

    /// The one line that says why it failed.
    pub fn why(&self) -> &str {
        assert_eq!(self.status, Some(1), "{self:?}");
        let mut lines = self.stderr.lines();
        let why = lines.find(|line| !line.contains("listening on"));
        let why = why.unwrap_or_else(|| panic!("it does not say why: {self:?}"));
        assert!(why.starts_with("vfio-migrate: "), "{self:?}");
        assert_eq!(lines.count(), 0, "one line: {self:?}");
        self.says_nothing_twice();
        why
    }

    /// No line repeats the part of a reason that is before it.
    pub fn says_nothing_twice(&self) {
        for line in self.stderr.lines() {
            let parts: Vec<_> = line.split(": ").collect();
            let twice = parts.windows(2).any(|pair| pair[0] == pair[1]);
            assert!(!twice, "{self:?}");
        }
    }
}
