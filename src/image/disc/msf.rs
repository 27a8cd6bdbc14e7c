//! Minutes, seconds, frames.

use std::fmt;

use super::FRAMES;

/// Sectors before that of address 0: the pause that every disc begins with.
const LEAD: u64 = 150;

/// A time as players count it: 75 frames, which are sectors, a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Msf {
    /// Minutes.
    pub minutes: u64,
    /// Seconds, below 60.
    pub seconds: u64,
    /// Frames, below 75.
    pub frames: u64,
}

impl Msf {
    /// So many frames.
    pub fn of_frames(frames: u64) -> Self {
        Self {
            minutes: frames / FRAMES / 60,
            seconds: frames / FRAMES % 60,
            frames: frames % FRAMES,
        }
    }

    /// Where on the disc sector `lba` is: that of address 0 is at 00:02:00.
    pub fn of_lba(lba: u64) -> Self {
        Self::of_frames(lba.saturating_add(LEAD))
    }

    /// The address that stands for it; `None` in the pause before address 0.
    pub fn lba(self) -> Option<u64> {
        ((self.minutes * 60 + self.seconds) * FRAMES + self.frames).checked_sub(LEAD)
    }

    /// As a sector's header has it, each number as two decimal digits; `None` from 100 minutes on.
    pub fn to_header(self) -> Option<[u8; 3]> {
        let digits = |n: u64| u8::try_from(n).ok().filter(|n| *n < 100);
        let [m, s, f] = [self.minutes, self.seconds, self.frames].map(digits);
        Some([m?, s?, f?].map(|n| n / 10 * 16 + n % 10))
    }

    /// From a sector's header; `None` where it has no such time.
    pub fn from_header(header: [u8; 3]) -> Option<Self> {
        let number = |byte: u8, end: u64| {
            let (tens, ones) = (byte >> 4, byte & 15);
            let n = u64::from(tens) * 10 + u64::from(ones);
            (tens < 10 && ones < 10 && n < end).then_some(n)
        };
        Some(Self {
            minutes: number(header[0], 100)?,
            seconds: number(header[1], 60)?,
            frames: number(header[2], FRAMES)?,
        })
    }
}

impl fmt::Display for Msf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:02}:{:02}:{:02}",
            self.minutes, self.seconds, self.frames
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_0_is_two_seconds_in_and_headers_are_decimal_digits() {
        assert_eq!(Msf::of_lba(0).to_string(), "00:02:00");
        assert_eq!(Msf::of_lba(0).to_header(), Some([0, 2, 0]));
        let far = Msf::of_lba(100_000);
        assert_eq!(far.to_string(), "22:15:25");
        assert_eq!(far.to_header(), Some([0x22, 0x15, 0x25]));
        assert_eq!(Msf::from_header([0x22, 0x15, 0x25]), Some(far));
        assert_eq!(far.lba(), Some(100_000));
        assert_eq!(Msf::of_frames(149).lba(), None);
        assert_eq!(Msf::of_lba(449_850).to_header(), None);
        for wrong in [[0x1a, 0, 0], [0, 0x60, 0], [0, 0, 0x75], [0xff, 0, 0]] {
            assert_eq!(Msf::from_header(wrong), None);
        }
    }
}
