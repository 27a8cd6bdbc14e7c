//! Requests that may not begin yet.

use std::collections::VecDeque;
use std::time::Instant;

use super::request::Command;
use crate::backend::Kind;

/// A request that was put off.
pub(super) type Kept = (u16, Command);

/// Requests that are held until the disk goes on, and those that have to wait for their turn.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    held: Vec<Kept>,
    late: VecDeque<Kept>,
    /// When the ring will announce a moment.
    armed: Option<Instant>,
}

impl Waiting {
    /// Keeps a request until the disk goes on.
    pub(super) fn hold(&mut self, tag: u16, command: Command) {
        self.held.push((tag, command));
    }

    /// Keeps a request until its turn, behind those that wait already.
    pub(super) fn delay(&mut self, tag: u16, command: Command) {
        self.late.push_back((tag, command));
    }

    /// Whether requests of this kind wait for their turn.
    pub(super) fn has(&self, kind: Kind) -> bool {
        // Asked for every request, and nearly always none does.
        !self.late.is_empty()
            && self
                .late
                .iter()
                .any(|(_, command)| command.shape.kind == kind)
    }

    /// All that are kept, oldest first, those that were held in front.
    pub(super) fn take(&mut self) -> Vec<Kept> {
        let mut all = std::mem::take(&mut self.held);
        all.extend(self.late.drain(..));
        all
    }

    /// Whether an announcement is to be asked for, so that there is one at `at` or before.
    pub(super) fn must_arm(&mut self, at: Instant) -> bool {
        let must = self.armed.is_none_or(|armed| at < armed);
        if must {
            self.armed = Some(at);
        }
        must
    }

    /// The announcement came.
    pub(super) fn disarm(&mut self) {
        self.armed = None;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use libublk::sys;

    use super::*;

    fn command(op_flags: u32) -> Command {
        let found = sys::ublksrv_io_desc {
            op_flags,
            nr_sectors: 8,
            ..Default::default()
        };
        Command::parse(&found).expect("known")
    }

    #[test]
    fn what_is_kept_comes_back_once_and_in_order() {
        let mut waiting = Waiting::default();
        waiting.delay(1, command(sys::UBLK_IO_OP_READ));
        waiting.delay(2, command(sys::UBLK_IO_OP_WRITE));
        waiting.hold(3, command(sys::UBLK_IO_OP_READ));
        assert!(waiting.has(Kind::Read) && !waiting.has(Kind::Flush));
        let tags: Vec<u16> = waiting.take().into_iter().map(|(tag, _)| tag).collect();
        assert_eq!(tags, [3, 1, 2]);
        assert!(waiting.take().is_empty() && !waiting.has(Kind::Read));
    }

    #[test]
    fn only_an_earlier_moment_needs_another_announcement() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        let after = |seconds| now + Duration::from_secs(seconds);
        assert!(waiting.must_arm(after(5)));
        assert!(!waiting.must_arm(after(6)));
        assert!(waiting.must_arm(after(4)));
        waiting.disarm();
        assert!(waiting.must_arm(after(9)));
    }
}
