//! How whole sectors are laid out.

use std::ops::Range;

use super::{RAW, SUBCHANNEL, USER};
use crate::image::sector::{Layout, Parts};

/// How a sector is laid out (ECMA-130, 14; the Yellow and Green Books).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Sound, or anything else without structure.
    Audio,
    /// Mode 0: nothing but zeroes.
    Empty,
    /// Mode 1: 2048 bytes of data with codes.
    Mode1,
    /// Mode 2, form 1 of CD-ROM XA: 2048 bytes of data with codes.
    Form1,
    /// Mode 2, form 2 of CD-ROM XA: 2324 bytes of data, with a code that detects errors or none.
    Form2,
    /// Mode 2 without a form: 2336 bytes of data.
    Formless,
}

/// Where the sync pattern, the header and the subheader lie.
const SYNC: (Parts, Range<usize>) = (Parts::SYNC, 0..12);
const HEADER: (Parts, Range<usize>) = (Parts::HEADER, 12..16);
const SUBHEADER: (Parts, Range<usize>) = (Parts::SUBHEADER, 16..24);
const ECC: (Parts, Range<usize>) = (Parts::ECC, 2076..RAW);

static AUDIO: [(Parts, Range<usize>); 1] = [(Parts::DATA, 0..RAW)];
static FORMLESS: [(Parts, Range<usize>); 3] = [SYNC, HEADER, (Parts::DATA, 16..RAW)];
static MODE1: [(Parts, Range<usize>); 6] = [
    SYNC,
    HEADER,
    (Parts::DATA, 16..2064),
    (Parts::EDC, 2064..2068),
    (Parts::ZERO, 2068..2076),
    ECC,
];
static FORM1: [(Parts, Range<usize>); 6] = [
    SYNC,
    HEADER,
    SUBHEADER,
    (Parts::DATA, 24..2072),
    (Parts::EDC, 2072..2076),
    ECC,
];
static FORM2: [(Parts, Range<usize>); 5] = [
    SYNC,
    HEADER,
    SUBHEADER,
    (Parts::DATA, 24..2348),
    (Parts::EDC, 2348..RAW),
];

impl Form {
    /// Its parts, and where in a whole sector they lie.
    pub fn parts(self) -> &'static [(Parts, Range<usize>)] {
        match self {
            Self::Audio => &AUDIO,
            Self::Empty | Self::Formless => &FORMLESS,
            Self::Mode1 => &MODE1,
            Self::Form1 => &FORM1,
            Self::Form2 => &FORM2,
        }
    }

    /// The layout of a sector of this form, as far as it lies in `stored` bytes of the whole one.
    pub fn layout(self, stored: &Range<usize>) -> Layout {
        let subchannel = (Parts::SUBCHANNEL, RAW..RAW + SUBCHANNEL);
        let parts = self.parts().iter().cloned();
        Layout::new(parts.chain([subchannel]), stored)
    }

    /// Where its code that detects errors is, and what that covers.
    pub fn edc(self) -> Option<(Range<usize>, Range<usize>)> {
        match self {
            Self::Mode1 => Some((2064..2068, 0..2064)),
            Self::Form1 => Some((2072..2076, 16..2072)),
            Self::Form2 => Some((2348..RAW, 16..2348)),
            Self::Audio | Self::Empty | Self::Formless => None,
        }
    }

    /// Whether it has a code that corrects errors.
    pub fn has_ecc(self) -> bool {
        matches!(self, Self::Mode1 | Self::Form1)
    }

    /// Where the data of a disk is in it; `None`: it has no 2048 bytes of data.
    pub fn user(self) -> Option<Range<usize>> {
        match self {
            Self::Mode1 | Self::Empty => Some(16..16 + USER),
            Self::Form1 => Some(24..24 + USER),
            Self::Audio | Self::Form2 | Self::Formless => None,
        }
    }

    /// What messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Audio => "audio",
            Self::Empty => "mode 0",
            Self::Mode1 => "mode 1",
            Self::Form1 => "mode 2 form 1",
            Self::Form2 => "mode 2 form 2",
            Self::Formless => "mode 2 without a form",
        }
    }
}
