//! Sectors stored in one way, for a track that stores them in another.

use super::{Form, Mode, Msf, RAW, make};
use crate::error::{Error, Result};
use crate::util::buf::is_zero;

/// Subheader of data that nothing else is known of, once.
const DATA: [u8; 4] = [0, 0, 8, 0];

/// Fills `out`, of the length that `to` stores sectors in, with a sector of this form that is whole
/// in `sector` as far as `from` stores it.  `lba` is its address where a header is made.
///
/// # Errors
/// `Corrupt` for a sector that a track of mode `to` has no place for; `OutOfRange` for an address
/// that no header can hold.
pub fn recode(
    sector: &[u8],
    form: Form,
    from: Mode,
    to: Mode,
    lba: u64,
    out: &mut [u8],
) -> Result<()> {
    if from == to || (from.is_audio() && to.is_audio()) {
        let window = to.stored();
        out.copy_from_slice(&sector[window]);
        return Ok(());
    }
    let mut raw = [0; RAW];
    raw.copy_from_slice(&sector[..RAW]);
    let keeps = matches!(from, Mode::Mode2Data | Mode::CdiData) && to.has_header();
    let form = match (keeps, to) {
        (true, _) => form,
        (false, Mode::Mode1 | Mode::Mode1Data) => moved(&mut raw, form, Form::Mode1, lba)?,
        (false, _) => moved(&mut raw, form, Form::Form1, lba)?,
    };
    if to.has_header() {
        let msf = Msf::of_lba(lba).to_header().ok_or_else(|| {
            Error::new(
                crate::error::ErrorKind::OutOfRange,
                format!("sector {lba} is past minute 99, so no header can hold its address"),
            )
        })?;
        let code = keeps && form == Form::Form2 && is_zero(&raw[2348..]);
        make(&mut raw, form, msf);
        if code {
            raw[2348..].fill(0);
        }
    }
    out.copy_from_slice(&raw[to.stored()]);
    Ok(())
}

/// Moves the data of a disk to where another form has it.
fn moved(raw: &mut [u8; RAW], from: Form, to: Form, lba: u64) -> Result<Form> {
    let (Some(source), Some(place)) = (from.user(), to.user()) else {
        let text = format!(
            "sector {lba} is of {}, and has no 2048 bytes of a disk",
            from.name()
        );
        return Err(Error::corrupt(text));
    };
    let mut data = [0; super::USER];
    data.copy_from_slice(&raw[source]);
    let mut subheader = [0; 8];
    subheader.copy_from_slice(&raw[16..24]);
    raw.fill(0);
    raw[place].copy_from_slice(&data);
    if to == Form::Form1 {
        let known = from == Form::Form1 && !is_zero(&subheader);
        let new = [DATA, DATA].concat();
        raw[16..24].copy_from_slice(if known { &subheader } else { &new });
    }
    Ok(to)
}
