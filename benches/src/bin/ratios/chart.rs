//! The chart of `--scale`: a column for what is varied, a row for what is measured.

use std::{io, path::Path};

use plotters::prelude::*;
use vfio_migration_benches::scale::Measured;

use crate::scale::Column;

/// What is measured: a name, and its value.
type Row = (&'static str, fn(&Measured) -> f64);

#[expect(clippy::cast_precision_loss, reason = "a place in a chart")]
const ROWS: &[Row] = &[
    ("CPU s for each GiB", |measured| measured.cpu_per_gib),
    ("GB/s", |measured| measured.rate / 1e9),
    ("peak MiB", |measured| (measured.peak >> 20) as f64),
];

/// Draws it.
pub fn draw(columns: &[Column], path: &Path) -> io::Result<()> {
    let root = SVGBackend::new(path, (1200, 780)).into_drawing_area();
    root.fill(&WHITE).map_err(io::Error::other)?;
    let areas = root.split_evenly((ROWS.len(), columns.len()));
    let panels = ROWS
        .iter()
        .flat_map(|row| columns.iter().map(move |column| (row, column)));
    for (area, ((name, value), column)) in areas.iter().zip(panels) {
        let points: Vec<(f64, f64)> = column
            .points
            .iter()
            .map(|(at, measured)| (*at, value(measured)))
            .collect();
        let (Some(first), Some(last)) = (points.first(), points.last()) else {
            continue;
        };
        let top = points.iter().map(|point| point.1).fold(0.0, f64::max) * 1.2;
        let mut chart = ChartBuilder::on(area)
            .caption(format!("{name} by {}", column.name), ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(44)
            .build_cartesian_2d((first.0..last.0 * 1.1).log_scale().base(2.0), 0.0..top)
            .map_err(io::Error::other)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_labels(6)
            .y_labels(5)
            .draw()
            .map_err(io::Error::other)?;
        let dots = points.iter().map(|at| Circle::new(*at, 3, BLUE.filled()));
        chart
            .draw_series(LineSeries::new(points.iter().copied(), BLUE))
            .map_err(io::Error::other)?;
        chart.draw_series(dots).map_err(io::Error::other)?;
    }
    root.present().map_err(io::Error::other)
}
