//! Plots over time as SVG, for the HTML report. Colours come from the page's style sheet.

use std::fmt::Write as _;

use super::escape;

/// The size of a plot in its own units; the page scales it.
const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 210.0;
/// The room around the curves: for the scale, the labels and the marks.
const LEFT: f64 = 56.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 24.0;
/// Marks that are nearer than this are written in two rows.
const MARK_WIDTH: f64 = 18.0;

/// Something that happened at a time.
#[derive(Clone, Debug)]
pub struct Mark {
    /// When, in seconds.
    pub at: f64,
    /// What to write at the top.
    pub label: String,
    /// What to tell when pointed at.
    pub title: String,
    /// Whether something broke, or was mended.
    pub is_fault: bool,
}

/// One curve.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Its name.
    pub name: String,
    /// Its class in the style sheet.
    pub class: &'static str,
    /// Its values, one for each step. Where there is none, the curve has a gap.
    pub values: Vec<Option<f64>>,
    /// Whether the space below it is filled.
    pub filled: bool,
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Plot {
    /// What it is, for those who can't see it.
    pub title: String,
    /// The unit of its values.
    pub unit: &'static str,
    /// The length of a step, in seconds.
    pub step_seconds: f64,
    /// The curves.
    pub curves: Vec<Curve>,
    /// The marks.
    pub marks: Vec<Mark>,
    /// The times in which nodes could not take part: from, to.
    pub shaded: Vec<(f64, f64)>,
    /// Whether each factor of ten takes the same room.
    pub is_logarithmic: bool,
}

impl Plot {
    /// The SVG element.
    pub fn svg(&self) -> String {
        let mut svg = String::new();
        let title = escape(&self.title);
        // Writing to a string can't fail.
        let _ = write!(
            svg,
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\" class=\"plot\">"
        );
        for (from, to) in &self.shaded {
            let (left, right) = (self.x(*from), self.x(to.min(self.seconds())));
            let _ = write!(
                svg,
                "<rect class=\"shade\" x=\"{left:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                (right - left).max(0.0),
                HEIGHT - TOP - BOTTOM
            );
        }
        self.write_scale(&mut svg);
        for curve in &self.curves {
            self.write_curve(&mut svg, curve);
        }
        self.write_marks(&mut svg);
        svg + "</svg>"
    }

    fn seconds(&self) -> f64 {
        let steps = self.curves.iter().map(|curve| curve.values.len()).max().unwrap_or_default();
        (steps as f64 * self.step_seconds).max(self.step_seconds)
    }

    fn x(&self, at: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * (at / self.seconds()).clamp(0.0, 1.0)
    }

    fn y(&self, value: f64) -> f64 {
        let (low, high) = self.range();
        let share = match self.is_logarithmic {
            true => (value.max(low) / low).log10() / (high / low).log10(),
            false => (value - low) / (high - low),
        };
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share.clamp(0.0, 1.0)
    }

    /// The ends of the scale.
    fn range(&self) -> (f64, f64) {
        let values = || self.curves.iter().flat_map(|curve| curve.values.iter().flatten().copied());
        let high = values().fold(0.0_f64, f64::max);
        if !self.is_logarithmic {
            return (0.0, round_up(high.max(1.0)));
        }
        let low = values().filter(|value| *value > 0.0).fold(f64::INFINITY, f64::min);
        let low = if low.is_finite() { 10_f64.powf(low.log10().floor()) } else { 1.0 };
        (low, 10_f64.powf(high.max(low * 10.0).log10().ceil()))
    }

    fn write_scale(&self, svg: &mut String) {
        let (low, high) = self.range();
        let lines: Vec<f64> = match self.is_logarithmic {
            true => {
                let decades = (high / low).log10().round() as i32;
                (0..=decades).map(|decade| low * 10_f64.powi(decade)).collect()
            }
            false => (0..=4).map(|part| high * f64::from(part) / 4.0).collect(),
        };
        for value in lines {
            let y = self.y(value);
            let right = WIDTH - RIGHT;
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"scale\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                y + 4.0,
                number(value)
            );
        }
        let _ = write!(svg, "<text class=\"scale\" x=\"2\" y=\"12\">{}</text>", escape(self.unit));
        let seconds = self.seconds();
        let every = [1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0];
        let every = every.into_iter().find(|every| seconds / every <= 14.0).unwrap_or(1200.0);
        let mut at = 0.0;
        while at <= seconds {
            let x = self.x(at);
            let _ = write!(
                svg,
                "<text class=\"scale\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{at:.0} s</text>",
                HEIGHT - 6.0
            );
            at += every;
        }
    }

    fn write_curve(&self, svg: &mut String, curve: &Curve) {
        // A step is drawn in its middle. Each stretch without a gap is a line of its own.
        let point =
            |place: usize, value: f64| (self.x((place as f64 + 0.5) * self.step_seconds), self.y(value));
        let mut stretches: Vec<Vec<(f64, f64)>> = vec![Vec::new()];
        for (place, value) in curve.values.iter().enumerate() {
            match value {
                Some(value) => stretches.last_mut().expect("there is always one").push(point(place, *value)),
                None => stretches.push(Vec::new()),
            }
        }
        for points in stretches.into_iter().filter(|points| !points.is_empty()) {
            let text: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let (first, last, floor) = (points[0].0, points[points.len() - 1].0, HEIGHT - BOTTOM);
            let text = text.join(" ");
            if curve.filled {
                let _ = write!(
                    svg,
                    "<polygon class=\"{} fill\" points=\"{first:.1},{floor} {text} {last:.1},{floor}\"/>",
                    curve.class
                );
            }
            match points.len() {
                // A line of one point can't be seen.
                1 => {
                    let _ = write!(
                        svg,
                        "<circle class=\"{} dot\" cx=\"{first:.1}\" cy=\"{:.1}\" r=\"2\"/>",
                        curve.class, points[0].1
                    );
                }
                _ => {
                    let _ = write!(svg, "<polyline class=\"{} line\" points=\"{text}\"/>", curve.class);
                }
            }
        }
    }

    fn write_marks(&self, svg: &mut String) {
        let mut before = f64::NEG_INFINITY;
        let mut row = 0;
        for mark in &self.marks {
            let x = self.x(mark.at);
            row = if x - before < MARK_WIDTH { 1 - row } else { 0 };
            before = x;
            let class = if mark.is_fault { "fault" } else { "repair" };
            let (floor, y) = (HEIGHT - BOTTOM, 9.0 + f64::from(row) * 12.0);
            let _ = write!(
                svg,
                "<g class=\"mark {class}\"><title>{}</title>\
                 <line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{floor}\"/>\
                 <circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"7.5\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></g>",
                escape(&mark.title),
                y + 7.5,
                y + 3.5,
                escape(&mark.label)
            );
        }
    }
}

/// The next number that people like: 1, 2, 4, 5 or 8 with zeros.
pub(super) fn round_up(value: f64) -> f64 {
    let unit = 10_f64.powf(value.log10().floor());
    let nice = [1.0, 2.0, 4.0, 5.0, 8.0, 10.0].into_iter().find(|nice| nice * unit >= value * 0.999_999);
    nice.unwrap_or(10.0) * unit
}

pub(super) fn number(value: f64) -> String {
    if value >= 10_000.0 {
        format!("{:.0}k", value / 1000.0)
    } else if value >= 10.0 || value == value.trunc() {
        format!("{value:.0}")
    } else {
        format!("{value:.2}").trim_end_matches('0').to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(values: Vec<Option<f64>>, is_logarithmic: bool) -> Plot {
        let curve = Curve { name: "c".into(), class: "one", values, filled: false };
        let mark = Mark { at: 1.0, label: "1".into(), title: "<kill>".into(), is_fault: true };
        Plot {
            title: "T & T".into(),
            unit: "ms",
            step_seconds: 1.0,
            curves: vec![curve],
            marks: vec![mark],
            shaded: vec![(1.0, 2.0)],
            is_logarithmic,
        }
    }

    #[test]
    fn a_curve_has_gaps_where_nothing_is_known_and_stays_inside_the_plot() {
        for is_logarithmic in [false, true] {
            let svg = plot(vec![Some(1.0), Some(900.0), None, Some(3.0), None], is_logarithmic).svg();
            assert_eq!((svg.matches("<polyline").count(), svg.matches("dot").count()), (1, 1), "{svg}");
            for coordinate in svg.split(['"', ' ', ',']).filter_map(|text| text.parse::<f64>().ok()) {
                assert!((0.0..=WIDTH).contains(&coordinate), "{coordinate} in {svg}");
            }
            assert!(svg.contains("T &amp; T") && svg.contains("&lt;kill&gt;"), "{svg}");
        }
    }

    #[test]
    fn nothing_at_all_is_a_plot_too() {
        let svg = plot(vec![None, None], true).svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn scales_end_at_numbers_that_people_like() {
        let ends: Vec<f64> = [0.3, 1.0, 3.1, 42.0, 100.0, 730.0, 9000.0].map(round_up).into();
        let expected = [0.4, 1.0, 4.0, 50.0, 100.0, 800.0, 10_000.0];
        assert!(ends.iter().zip(expected).all(|(end, nice)| (end - nice).abs() < 1e-9 * nice), "{ends:?}");
    }
}
