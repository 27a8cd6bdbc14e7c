//! Whether a sector is what it says it is, and making it so.

use super::{Form, RAW, Raw, SYNC, ecc, edc};
use crate::util::buf::is_zero;

/// Where the block of the code that corrects errors begins.
const BLOCK: usize = 12;
/// Set in a subheader's third byte, its submode: the sector is of form 2.
const FORM2: u8 = 0x20;

/// What whoever describes a sector says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// Mode 1.
    Mode1,
    /// Mode 2: the sector says which form it has.
    Mode2,
}

/// What is wrong with a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// The sync pattern.
    pub sync: bool,
    /// The mode in its header.
    pub mode: bool,
    /// The code that detects errors, or what it covers.
    pub edc: bool,
    /// The first code that corrects errors, or what it covers.
    pub p: bool,
    /// The second.
    pub q: bool,
    /// Bytes that are to be zero.
    pub zero: bool,
}

impl Faults {
    /// Whether there are none.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }

    /// Whether a code is wrong, or something that one covers.
    pub fn has_wrong_codes(self) -> bool {
        self.edc || self.p || self.q
    }

    /// The parts that are wrong, as reports have them.
    pub fn names(self) -> Vec<&'static str> {
        let all = [
            (self.sync, "sync"),
            (self.mode, "header"),
            (self.edc, "edc"),
            (self.zero, "zero"),
            (self.p, "p"),
            (self.q, "q"),
        ];
        all.iter()
            .filter(|(is, _)| *is)
            .map(|(_, name)| *name)
            .collect()
    }
}

/// What a sector is, and what is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judged {
    /// Its form.
    pub form: Form,
    /// What is wrong.
    pub faults: Faults,
    /// Whether it has a code: where it has none, the sync pattern alone says that it is a sector.
    pub has_code: bool,
}

impl Judged {
    /// Whether what it holds cannot be taken as it is.
    pub fn is_damaged(&self) -> bool {
        self.faults.has_wrong_codes() || (self.faults.sync && !self.has_code)
    }
}

/// The block of the code that corrects errors; in mode 2 the header does not count.
fn block(raw: &Raw, form: Form) -> ecc::Block {
    let mut block = [0; ecc::BLOCK];
    let skipped = if form == Form::Form1 { 4 } else { 0 };
    block[skipped..].copy_from_slice(&raw[BLOCK + skipped..]);
    block
}

/// What is wrong with a sector of this form.
fn faults(raw: &Raw, form: Form) -> Faults {
    let mut faults = Faults::default();
    if form == Form::Audio {
        return faults;
    }
    faults.sync = raw[..SYNC.len()] != SYNC;
    faults.mode = raw[15] != mode(form);
    if let Some((place, covered)) = form.edc() {
        let stored = &raw[place];
        let right = edc::edc(&raw[covered]).to_le_bytes();
        faults.edc = stored != right && !(form == Form::Form2 && is_zero(stored));
    }
    if form.has_ecc() {
        let block = block(raw, form);
        faults.p = !ecc::p_is_right(&block);
        faults.q = !ecc::q_is_right(&block);
    }
    match form {
        Form::Mode1 => faults.zero = raw[2068..2076] != [0; 8],
        Form::Empty => faults.zero = !is_zero(&raw[16..]),
        _ => {}
    }
    faults
}

/// The mode that the header of a sector of this form has.
fn mode(form: Form) -> u8 {
    match form {
        Form::Audio | Form::Empty => 0,
        Form::Mode1 => 1,
        Form::Form1 | Form::Form2 | Form::Formless => 2,
    }
}

/// The form that a subheader says; both copies of it are the same where there is one.
fn form_of_subheader(raw: &Raw) -> Form {
    match (raw[16..20] == raw[20..24], raw[18] & FORM2 != 0) {
        (false, _) => Form::Formless,
        (true, true) => Form::Form2,
        (true, false) => Form::Form1,
    }
}

/// The forms that a sector may have, the likeliest first.
fn candidates(raw: &Raw, declared: Declared) -> [Form; 4] {
    let of_mode2 = match form_of_subheader(raw) {
        // Where the copies differ one may be damaged.
        Form::Formless => [Form::Form1, Form::Form2, Form::Mode1, Form::Formless],
        form @ Form::Form2 => [form, Form::Form1, Form::Mode1, form],
        form => [form, Form::Form2, Form::Mode1, form],
    };
    match (raw[15], declared) {
        (0, _) if is_zero(&raw[16..]) => [Form::Empty; 4],
        // In a track of mode 1 a sector without codes is no more likely than a damaged mode.
        (2, Declared::Mode1) if form_of_subheader(raw) == Form::Formless => {
            [Form::Mode1, Form::Form1, Form::Form2, Form::Mode1]
        }
        (2, _) | (0 | 3.., Declared::Mode2) => of_mode2,
        (1, _) | (_, Declared::Mode1) => [Form::Mode1, of_mode2[0], of_mode2[1], of_mode2[1]],
    }
}

/// Says what a sector is: the form of which nothing is wrong with it, else the one that it, or who
/// describes it, says it has.
pub fn judge(raw: &Raw, declared: Declared) -> Judged {
    let forms = candidates(raw, declared);
    let [first, ..] = forms;
    let of = |form| Judged {
        form,
        faults: faults(raw, form),
        has_code: !is_unproven(raw, form),
    };
    let likeliest = of(first);
    if likeliest.faults.is_none() {
        return likeliest;
    }
    let others = forms[1..]
        .iter()
        .filter(|form| **form != first)
        .map(|form| of(*form));
    let right = others.into_iter().find(|judged| judged.faults.is_none());
    match right {
        // A sector without codes is never wrong: what is more like one with codes is a damaged one.
        Some(judged) if judged.form == Form::Formless && is_like_form1(raw) => likeliest,
        Some(judged) => judged,
        None => likeliest,
    }
}

/// Whether more codewords of form 1 are right than would be by chance: of one in 65536 each.
fn is_like_form1(raw: &Raw) -> bool {
    ecc::right_words(&block(raw, Form::Form1)) >= 3
}

/// A sector as it was before it was damaged, where its codes say so beyond doubt: all of P, Q and
/// EDC are right then.  The sync pattern is a constant; a header that no code covers stays.
pub fn correct(raw: &Raw, declared: Declared) -> Option<(Form, Raw)> {
    let forms = candidates(raw, declared);
    let forms = forms
        .iter()
        .enumerate()
        .filter(|(n, form)| !forms[..*n].contains(form));
    forms.map(|(_, form)| *form).find_map(|form| {
        let found = corrected(raw, form)?;
        Some((form, found))
    })
}

fn corrected(raw: &Raw, form: Form) -> Option<Raw> {
    let mut tried = *raw;
    tried[..SYNC.len()].copy_from_slice(&SYNC);
    let is_right = |raw: &Raw| {
        let faults = faults(raw, form);
        !(faults.sync || faults.has_wrong_codes())
    };
    if is_right(&tried) && !is_unproven(&tried, form) {
        return Some(tried);
    }
    if !form.has_ecc() {
        return None;
    }
    let skipped = if form == Form::Form1 { 4 } else { 0 };
    ecc::correct(&block(&tried, form)).find_map(|block| {
        if block[..skipped] != [0; 4][..skipped] {
            return None;
        }
        let mut found = tried;
        found[BLOCK + skipped..].copy_from_slice(&block[skipped..]);
        // Of zeroes with a few bytes among them nobody can tell that they were damaged.
        let is_form =
            form != Form::Form1 || (form_of_subheader(&found) == form && !is_zero(&found[16..]));
        (is_form && is_right(&found)).then_some(found)
    })
}

/// Whether nothing confirms that the sector is what it says: it has no code, or is all zeroes, for
/// which any code is right.
fn is_unproven(raw: &Raw, form: Form) -> bool {
    match form {
        Form::Audio | Form::Empty | Form::Formless => true,
        Form::Form1 => is_zero(&raw[16..]),
        Form::Form2 => is_zero(&raw[2348..]),
        Form::Mode1 => false,
    }
}

/// Makes the codes of a sector of this form for what it holds; of form 2, too.
pub fn make_codes(raw: &mut Raw, form: Form) {
    if let Some((place, covered)) = form.edc() {
        let code = edc::edc(&raw[covered]).to_le_bytes();
        raw[place].copy_from_slice(&code);
    }
    if form.has_ecc() {
        let mut block = block(raw, form);
        ecc::make(&mut block);
        raw[2076..].copy_from_slice(&block[2064..]);
    }
}

/// Makes a sector of this form of its data, which is in place: the sync pattern, the header, what
/// is to be zero, the codes.
pub fn make(raw: &mut Raw, form: Form, msf: [u8; 3]) {
    if form == Form::Audio {
        return;
    }
    raw[..SYNC.len()].copy_from_slice(&SYNC);
    raw[12..15].copy_from_slice(&msf);
    raw[15] = mode(form);
    match form {
        Form::Mode1 => raw[2068..2076].fill(0),
        Form::Empty => raw[16..RAW].fill(0),
        _ => {}
    }
    make_codes(raw, form);
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    fn low(n: usize) -> u8 {
        n.to_le_bytes()[0]
    }

    fn sector(form: Form, fill: impl Fn(usize) -> u8) -> Raw {
        let mut raw = [0; RAW];
        let data = form
            .parts()
            .iter()
            .find(|(part, _)| *part == crate::image::sector::Parts::DATA);
        let (_, data) = data.expect("has data").clone();
        for (n, byte) in raw[data].iter_mut().enumerate() {
            *byte = fill(n);
        }
        let submode = if form == Form::Form2 { FORM2 } else { 8 };
        if matches!(form, Form::Form1 | Form::Form2) {
            raw[16..24].copy_from_slice(&[0, 0, submode, 0, 0, 0, submode, 0]);
        }
        make(&mut raw, form, [0, 2, 0]);
        raw
    }

    fn hash(raw: &Raw) -> String {
        let bytes = Sha256::digest(raw);
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn mode_1_sectors_are_those_of_the_test_vectors() {
        let zeroes = sector(Form::Mode1, |_| 0);
        assert_eq!(zeroes[2064..2068], [0xc5, 0x13, 0x68, 0x2b]);
        assert_eq!(zeroes[2076..2080], [0, 0xf7, 0, 0xf5]);
        assert_eq!(zeroes[2248..2252], [0, 0x41, 0, 0]);
        let expected = "b4f18ab66709c9b3fdef2721cc323e031b6728f3ca6c57b7c435c96189222250";
        assert_eq!(hash(&zeroes), expected);
        let counted = sector(Form::Mode1, |n| n.to_le_bytes()[0]);
        assert_eq!(counted[2064..2068], [0x27, 0x97, 0x39, 0xe6]);
        let expected = "f6a94f686e87d4dd2816703689017aa16078564724f033e97eb0faa23cb1adb3";
        assert_eq!(hash(&counted), expected);
    }

    #[test]
    fn every_form_is_recognised_whatever_the_sheet_says() {
        let forms = [
            Form::Empty,
            Form::Mode1,
            Form::Form1,
            Form::Form2,
            Form::Formless,
        ];
        for form in forms {
            let raw = sector(form, |n| {
                if form == Form::Empty {
                    0
                } else {
                    low(n * 7 % 251)
                }
            });
            for declared in [Declared::Mode1, Declared::Mode2] {
                if (form, declared) == (Form::Formless, Declared::Mode1) {
                    assert!(judge(&raw, declared).faults.has_wrong_codes());
                    continue;
                }
                let judged = judge(&raw, declared);
                assert_eq!((judged.form, judged.faults), (form, Faults::default()));
            }
        }
    }

    #[test]
    fn damage_is_told_by_part_and_corrected_byte_for_byte() {
        let parts = [
            (0, vec!["sync", "edc"]),
            (13, vec!["edc", "p", "q"]),
            (500, vec!["edc", "p", "q"]),
            (2064, vec!["edc", "p", "q"]),
            (2070, vec!["zero", "p", "q"]),
            (2076, vec!["p", "q"]),
            (2300, vec!["q"]),
        ];
        let right = sector(Form::Mode1, |n| low(n % 251));
        for (at, names) in parts {
            let mut wrong = right;
            wrong[at] ^= 0x55;
            assert_eq!(judge(&wrong, Declared::Mode1).faults.names(), names, "{at}");
            let found = correct(&wrong, Declared::Mode1);
            assert_eq!(found, Some((Form::Mode1, right)), "{at}");
        }
    }

    #[test]
    fn a_damaged_subheader_is_no_reason_to_take_a_sector_for_formless() {
        let right = sector(Form::Form1, |n| low(n % 251));
        for at in 16..24 {
            let mut wrong = right;
            wrong[at] ^= 0x20;
            let judged = judge(&wrong, Declared::Mode2);
            assert_eq!(judged.form, Form::Form1, "{at}");
            assert!(judged.faults.has_wrong_codes(), "{at}");
            assert_eq!(correct(&wrong, Declared::Mode2), Some((Form::Form1, right)));
        }
    }

    #[test]
    fn form_2_may_have_no_code_and_a_wrong_one_cannot_be_corrected() {
        let mut raw = sector(Form::Form2, |n| low(n % 251));
        assert!(judge(&raw, Declared::Mode2).faults.is_none());
        raw[100] ^= 1;
        assert_eq!(judge(&raw, Declared::Mode2).faults.names(), ["edc"]);
        assert_eq!(correct(&raw, Declared::Mode2), None);
        raw[2348..].fill(0);
        assert!(judge(&raw, Declared::Mode2).faults.is_none());
    }

    #[test]
    fn a_hole_of_zeroes_is_damage_that_nothing_corrects() {
        let mut raw = [0; RAW];
        for (mode, declared) in [
            (0, Declared::Mode1),
            (0, Declared::Mode2),
            (2, Declared::Mode2),
        ] {
            raw[15] = mode;
            let judged = judge(&raw, declared);
            assert!(judged.faults.sync && judged.is_damaged(), "{judged:?}");
            assert_eq!(correct(&raw, declared), None, "{mode}");
        }
        // With a sync pattern it is a sector.
        let empty = sector(Form::Empty, |_| 0);
        assert!(!judge(&empty, Declared::Mode1).is_damaged());
        // What a code confirms needs none.
        let mut form2 = sector(Form::Form2, |n| low(n % 251));
        let right = form2;
        form2[..12].fill(0);
        assert!(!judge(&form2, Declared::Mode2).is_damaged());
        assert_eq!(correct(&form2, Declared::Mode2), Some((Form::Form2, right)));
    }

    #[test]
    fn damage_is_corrected_or_left_and_never_made_worse() {
        let mut rng = fastrand::Rng::with_seed(5);
        let forms = [
            (Form::Mode1, Declared::Mode1),
            (Form::Form1, Declared::Mode2),
        ];
        let mut corrected = 0;
        for _ in 0..1000 {
            let (form, declared) = forms[rng.usize(0..2)];
            let salt = rng.usize(..1000);
            let right = sector(form, |n| low(n * salt % 255));
            let mut wrong = right;
            // In mode 2 no code covers the header.
            let first = if form == Form::Form1 { 16 } else { 12 };
            let few = rng.bool();
            for _ in 0..rng.usize(1..if few { 12 } else { 300 }) {
                wrong[rng.usize(first..RAW)] = rng.u8(..);
            }
            match correct(&wrong, declared) {
                Some(found) => {
                    assert_eq!(found, (form, right));
                    corrected += 1;
                }
                None => assert!(!few, "a dozen bytes are within the strength of the code"),
            }
        }
        assert!(corrected > 500, "{corrected}");
    }
}
